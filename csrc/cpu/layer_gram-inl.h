// layer_gram for one instruction set; see vector_loops-inl.h for how this text is used.

// lanes[r, c, :] += a_r · b_c over one chunk, for a kRows x kCols tile of the Gram matrix held in registers.
// On the diagonal a == b, and only c >= r is computed. `n` is a multiple of kNumLanes.
template <class Vec, int kRows, int kCols, bool kDiagonal>
MF_NOINLINE void dot_tile(const typename Vec::Scalar* a, const typename Vec::Scalar* b, std::size_t n,
                          typename Vec::Scalar* lanes, std::size_t lanes_row_stride) {
  for (std::size_t lane = 0; lane < kNumLanes; lane += Vec::kLanes) {
    typename Vec::Reg sum[kRows][kCols];
    for (int r = 0; r < kRows; ++r) {
      for (int c = kDiagonal ? r : 0; c < kCols; ++c) {
        sum[r][c] = Vec::load(lanes + r * lanes_row_stride + c * kNumLanes + lane);
      }
    }
    for (std::size_t i = lane; i < n; i += kNumLanes) {
      typename Vec::Reg x[kRows];
      for (int r = 0; r < kRows; ++r) x[r] = Vec::load(a + r * kChunkNumel + i);
      for (int c = 0; c < kCols; ++c) {
        const typename Vec::Reg y = kDiagonal ? x[c < kRows ? c : 0] : Vec::load(b + c * kChunkNumel + i);
        for (int r = 0; r < (kDiagonal ? c + 1 : kRows); ++r) sum[r][c] = Vec::fma(x[r], y, sum[r][c]);
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int c = kDiagonal ? r : 0; c < kCols; ++c) {
        Vec::store(lanes + r * lanes_row_stride + c * kNumLanes + lane, sum[r][c]);
      }
    }
  }
}

template <class Vec>
using DotTile = void (*)(const typename Vec::Scalar*, const typename Vec::Scalar*, std::size_t, typename Vec::Scalar*,
                         std::size_t);

// Adds one chunk's products to all lanes of the upper triangle, tile by tile.
template <class Vec>
void dot_chunk(const typename Vec::Scalar* values, std::size_t num_operands, std::size_t n,
               typename Vec::Scalar* lanes) {
  static constexpr DotTile<Vec> kDiagonalTiles[4] = {dot_tile<Vec, 1, 1, true>, dot_tile<Vec, 2, 2, true>,
                                                     dot_tile<Vec, 3, 3, true>, dot_tile<Vec, 4, 4, true>};
  static constexpr DotTile<Vec> kTiles[2][4] = {
      {dot_tile<Vec, 1, 1, false>, dot_tile<Vec, 2, 1, false>, dot_tile<Vec, 3, 1, false>, dot_tile<Vec, 4, 1, false>},
      {dot_tile<Vec, 1, 2, false>, dot_tile<Vec, 2, 2, false>, dot_tile<Vec, 3, 2, false>, dot_tile<Vec, 4, 2, false>}};
  const std::size_t row_stride = num_operands * kNumLanes;
  for (std::size_t i = 0; i < num_operands; i += 4) {
    const std::size_t rows = min_size(4, num_operands - i);
    const typename Vec::Scalar* a = values + i * kChunkNumel;
    kDiagonalTiles[rows - 1](a, a, n, lanes + i * row_stride + i * kNumLanes, row_stride);
    for (std::size_t j = i + rows; j < num_operands; j += 2) {
      const std::size_t cols = min_size(2, num_operands - j);
      kTiles[cols - 1][rows - 1](a, values + j * kChunkNumel, n, lanes + i * row_stride + j * kNumLanes, row_stride);
    }
  }
}

// The same for up to four operands of one dtype, straight from memory: v_i live in registers only, which makes the sum
// keep up with one core's memory bandwidth (26 GB/s instead of 11, Zen 4, bf16, T = 3). Same order, same bits.
// `n` is a multiple of kNumLanes; lanes is [V, V, kNumLanes].
template <class Vec, DType kDType, int kOperands, bool kHasBase>
MF_NOINLINE void dot_chunk_direct(const std::byte* const* src, std::size_t n, typename Vec::Scalar* lanes) {
  using Reg = typename Vec::Reg;
  const std::byte* const src0 = src[0];
  const std::byte* const src1 = src[kOperands > 1 ? 1 : 0];
  const std::byte* const src2 = src[kOperands > 2 ? 2 : 0];
  const std::byte* const src3 = src[kOperands > 3 ? 3 : 0];
  for (std::size_t lane = 0; lane < kNumLanes; lane += Vec::kLanes) {
    // Named registers: GCC keeps arrays of them on the stack, which halves the speed.
    const auto lanes_of = [=](int r, int c) { return lanes + (r * kOperands + c) * kNumLanes + lane; };
    const auto load_sum = [=](int r, int c) { return c < kOperands ? Vec::load(lanes_of(r, c)) : Vec::zero(); };
    Reg sum00 = load_sum(0, 0), sum01 = load_sum(0, 1), sum02 = load_sum(0, 2), sum03 = load_sum(0, 3);
    Reg sum11 = load_sum(1, 1), sum12 = load_sum(1, 2), sum13 = load_sum(1, 3);
    Reg sum22 = load_sum(2, 2), sum23 = load_sum(2, 3);
    Reg sum33 = load_sum(3, 3);
    for (std::size_t e = lane; e < n; e += kNumLanes) {
      const std::size_t offset = e * kItemsize<kDType>;
      __builtin_prefetch(src0 + offset + kPrefetchNbytes);
      const Reg v0 = Vec::template load_as<kDType>(src0 + offset);
      const auto load_v = [=](const std::byte* p) {
        __builtin_prefetch(p + offset + kPrefetchNbytes);
        const Reg x = Vec::template load_as<kDType>(p + offset);
        return kHasBase ? Vec::sub(x, v0) : x;
      };
      sum00 = Vec::fma(v0, v0, sum00);
      if constexpr (kOperands > 1) {
        const Reg v1 = load_v(src1);
        sum01 = Vec::fma(v0, v1, sum01);
        sum11 = Vec::fma(v1, v1, sum11);
        if constexpr (kOperands > 2) {
          const Reg v2 = load_v(src2);
          sum02 = Vec::fma(v0, v2, sum02);
          sum12 = Vec::fma(v1, v2, sum12);
          sum22 = Vec::fma(v2, v2, sum22);
          if constexpr (kOperands > 3) {
            const Reg v3 = load_v(src3);
            sum03 = Vec::fma(v0, v3, sum03);
            sum13 = Vec::fma(v1, v3, sum13);
            sum23 = Vec::fma(v2, v3, sum23);
            sum33 = Vec::fma(v3, v3, sum33);
          }
        }
      }
    }
    const auto store_sum = [=](int r, int c, Reg sum) {
      if (c < kOperands) Vec::store(lanes_of(r, c), sum);
    };
    store_sum(0, 0, sum00), store_sum(0, 1, sum01), store_sum(0, 2, sum02), store_sum(0, 3, sum03);
    store_sum(1, 1, sum11), store_sum(1, 2, sum12), store_sum(1, 3, sum13);
    store_sum(2, 2, sum22), store_sum(2, 3, sum23);
    store_sum(3, 3, sum33);
  }
}

using DirectDot = void (*)(const std::byte* const*, std::size_t, float*);
constexpr std::size_t kMaxDirectOperands = 4;
// Vectors of fewer lanes than kNumLanes read a chunk more than once, so it has to fit the L1 cache.
constexpr std::size_t kDirectChunkNumel = VecF::kLanes == kNumLanes ? kBlockNumel : 1024;

template <DType kDType, bool kHasBase>
DirectDot direct_dot(std::size_t num_operands) {
  static constexpr DirectDot kByOperands[kMaxDirectOperands] = {
      dot_chunk_direct<VecF, kDType, 1, kHasBase>, dot_chunk_direct<VecF, kDType, 2, kHasBase>,
      dot_chunk_direct<VecF, kDType, 3, kHasBase>, dot_chunk_direct<VecF, kDType, 4, kHasBase>};
  return kByOperands[num_operands - 1];
}

// The direct kernel for these operands, or null if they need the general one (mixed dtypes, F64, or more than four).
MF_INLINE DirectDot find_direct_dot(const Operand* operands, std::size_t num_operands, bool has_base) {
  if (num_operands > kMaxDirectOperands || !same_dtypes(operands, num_operands)) return nullptr;
  switch (operands[0].dtype) {
    case DType::kF32:
      return has_base ? direct_dot<DType::kF32, true>(num_operands) : direct_dot<DType::kF32, false>(num_operands);
    case DType::kF16:
      return has_base ? direct_dot<DType::kF16, true>(num_operands) : direct_dot<DType::kF16, false>(num_operands);
    case DType::kBF16:
      return has_base ? direct_dot<DType::kBF16, true>(num_operands) : direct_dot<DType::kBF16, false>(num_operands);
    case DType::kF64:
      return nullptr;
  }
  return nullptr;
}

// values[i, :] = v_i for the chunk [first, first + n), padded with zeros to a multiple of kNumLanes.
template <class Vec>
void load_chunk(const Operand* operands, std::size_t num_operands, bool has_base, std::size_t first, std::size_t n,
                typename Vec::Scalar* values) {
  for (std::size_t i = 0; i < num_operands; ++i) {
    typename Vec::Scalar* out = values + i * kChunkNumel;
    if (has_base && i > 0) {
      const typename Vec::Scalar* base = values;
      for_each_vector<Vec>(operands[i], first, n, [=](std::size_t e, typename Vec::Reg x) {
        Vec::store(out + e, Vec::sub(x, Vec::load(base + e)));
      });
    } else {
      for_each_vector<Vec>(operands[i], first, n, [=](std::size_t e, typename Vec::Reg x) { Vec::store(out + e, x); });
    }
    for (std::size_t e = round_up(n, Vec::kLanes); e < round_up(n, kNumLanes); ++e) out[e] = 0;
  }
}

// block_sums[i*V + j] = Σ_e v_i[e] v_j[e] of one block, for i <= j. Lanes are added in fp64 as a fixed tree.
template <class Vec>
void gram_block(const Operand* operands, std::size_t num_operands, bool has_base, std::size_t first, std::size_t numel,
                const Workspace& workspace, double* block_sums) {
  using Scalar = typename Vec::Scalar;
  auto* values = reinterpret_cast<Scalar*>(workspace.values);
  auto* lanes = reinterpret_cast<Scalar*>(workspace.lanes);
  for (std::size_t i = 0; i < num_operands * num_operands * kNumLanes; ++i) lanes[i] = 0;
  std::size_t done = 0;
  if constexpr (sizeof(Scalar) == 4) {
    if (const DirectDot direct = find_direct_dot(operands, num_operands, has_base)) {
      const std::size_t n = numel / kNumLanes * kNumLanes;
      const std::size_t item_nbytes = itemsize(operands[0].dtype);
      for (; done < n; done += min_size(kDirectChunkNumel, n - done)) {
        const std::byte* src[kMaxDirectOperands];
        for (std::size_t i = 0; i < num_operands; ++i) src[i] = operands[i].data + (first + done) * item_nbytes;
        direct(src, min_size(kDirectChunkNumel, n - done), lanes);
      }
    }
  }
  for (; done < numel; done += kChunkNumel) {
    const std::size_t n = min_size(kChunkNumel, numel - done);
    load_chunk<Vec>(operands, num_operands, has_base, first + done, n, values);
    dot_chunk<Vec>(values, num_operands, round_up(n, kNumLanes), lanes);
  }
  for (std::size_t i = 0; i < num_operands; ++i) {
    for (std::size_t j = i; j < num_operands; ++j) {
      const Scalar* lane = lanes + (i * num_operands + j) * kNumLanes;
      double tree[kNumLanes];
      for (std::size_t l = 0; l < kNumLanes; ++l) tree[l] = static_cast<double>(lane[l]);
      for (std::size_t width = kNumLanes / 2; width > 0; width /= 2) {
        for (std::size_t l = 0; l < width; ++l) tree[l] += tree[l + width];
      }
      block_sums[i * num_operands + j] = tree[0];
    }
  }
}

// Whether v_i is zero throughout the block, so that a sum of squares of exactly 0 is no underflow.
MF_INLINE bool equals_base(const Operand* operands, bool has_base, std::size_t i, std::size_t first,
                           std::size_t numel) {
  typename VecF::Reg difference = VecF::zero();
  for (std::size_t done = 0; done < numel; done += kChunkNumel) {
    const std::size_t n = min_size(kChunkNumel, numel - done);
    alignas(64) float base[kChunkNumel];
    for (std::size_t e = 0; e < kChunkNumel; ++e) base[e] = 0;
    if (has_base && i > 0) {
      float* out = base;
      for_each_vector<VecF>(operands[0], first + done, n, [=](std::size_t e, VecF::Reg x) { VecF::store(out + e, x); });
    }
    const float* subtrahend = base;
    for_each_vector<VecF>(operands[i], first + done, n, [&](std::size_t e, VecF::Reg x) {
      difference = VecF::max_abs(difference, VecF::sub(x, VecF::load(subtrahend + e)));
    });
  }
  return VecF::count_not_below(difference, VecF::broadcast(0x1p-149f)) == 0;
}

// fp32 squares are exact to 2^-24 as long as they neither overflow nor fall below 2^-126; a block whose sum of squares
// is in this range has lost at most 4096 · 2^-149 / 2^-80 = 2^-57 of it to underflow.
constexpr double kLeastReliableSum = 0x1p-80;
constexpr double kGreatestReliableSum = 0x1p+100;

MF_INLINE bool is_reliable(const Operand* operands, std::size_t num_operands, bool has_base, std::size_t first,
                           std::size_t numel, const double* block_sums) {
  for (std::size_t i = 0; i < num_operands; ++i) {
    const double sum = block_sums[i * num_operands + i];
    if (!(sum <= kGreatestReliableSum)) return false;  // also NaN
    if (sum < kLeastReliableSum && !(sum == 0 && equals_base(operands, has_base, i, first, numel))) return false;
  }
  return true;
}

void gram_span(const Operand* operands, std::size_t num_operands, bool has_base, std::size_t numel,
               const Workspace& workspace, double* sums) {
  const bool in_fp64 = any_f64(operands, num_operands);
  for (std::size_t first = 0; first < numel; first += kBlockNumel) {
    const std::size_t n = min_size(kBlockNumel, numel - first);
    if (!in_fp64) gram_block<VecF>(operands, num_operands, has_base, first, n, workspace, workspace.sums);
    if (in_fp64 || !is_reliable(operands, num_operands, has_base, first, n, workspace.sums)) {
      gram_block<VecD>(operands, num_operands, has_base, first, n, workspace, workspace.sums);
    }
    for (std::size_t i = 0; i < num_operands; ++i) {
      for (std::size_t j = i; j < num_operands; ++j) sums[i * num_operands + j] += workspace.sums[i * num_operands + j];
    }
  }
}
