// The products that layer_gram sums, a chunk at a time; see vector_loops-inl.h for how this text is used.

// lanes[r, c, :] += a_r · b_c over one chunk, for a kRows x kCols tile of the Gram matrix held in registers.
// On the diagonal a == b, and only c >= r is computed. `n` is a multiple of kNumLanes.
template <class Vec, int kRows, int kCols, bool kDiagonal>
MF_NOINLINE void dot_tile(const typename Vec::Scalar* a, const typename Vec::Scalar* b, std::size_t n,
                          typename Vec::Scalar* lanes, std::size_t lanes_row_stride) {
  for (std::size_t lane = 0; lane < kNumLanes; lane += Vec::kLanes) {
    typename Vec::Reg sum[kRows][kCols];
    MF_UNROLL for (int r = 0; r < kRows; ++r) {
      MF_UNROLL for (int c = kDiagonal ? r : 0; c < kCols; ++c) {
        sum[r][c] = Vec::load(lanes + r * lanes_row_stride + c * kNumLanes + lane);
      }
    }
    for (std::size_t i = lane; i < n; i += kNumLanes) {
      typename Vec::Reg x[kRows];
      MF_UNROLL for (int r = 0; r < kRows; ++r) x[r] = Vec::load(a + r * kChunkNumel + i);
      MF_UNROLL for (int c = 0; c < kCols; ++c) {
        const typename Vec::Reg y = kDiagonal ? x[c < kRows ? c : 0] : Vec::load(b + c * kChunkNumel + i);
        MF_UNROLL for (int r = 0; r < (kDiagonal ? c + 1 : kRows); ++r) sum[r][c] = Vec::fma(x[r], y, sum[r][c]);
      }
    }
    MF_UNROLL for (int r = 0; r < kRows; ++r) {
      MF_UNROLL for (int c = kDiagonal ? r : 0; c < kCols; ++c) {
        Vec::store(lanes + r * lanes_row_stride + c * kNumLanes + lane, sum[r][c]);
      }
    }
  }
}

template <class Vec>
using DotTile = void (*)(const typename Vec::Scalar*, const typename Vec::Scalar*, std::size_t, typename Vec::Scalar*,
                         std::size_t);

// Adds the products of four operands with `num_cols` later ones. As many columns at a time as there are registers for.
template <class Vec>
MF_INLINE void dot_tiles(const typename Vec::Scalar* a, const typename Vec::Scalar* b, std::size_t num_cols,
                         std::size_t n, typename Vec::Scalar* lanes, std::size_t lanes_row_stride) {
  constexpr int kCols = Vec::kNumRegs >= 32 ? 4 : 2;
  constexpr int kThree = kCols == 4 ? 3 : 1;  // unused with two
  static constexpr DotTile<Vec> kTiles[4] = {dot_tile<Vec, 4, 1, false>, dot_tile<Vec, 4, 2, false>,
                                             dot_tile<Vec, 4, kThree, false>, dot_tile<Vec, 4, kCols, false>};
  for (std::size_t j = 0; j < num_cols; j += kCols) {
    const std::size_t cols = min_size(kCols, num_cols - j);
    kTiles[cols - 1](a, b + j * kChunkNumel, n, lanes + j * kNumLanes, lanes_row_stride);
  }
}

// Adds one chunk's products to all lanes of the upper triangle, tile by tile.
template <class Vec>
void dot_chunk(const typename Vec::Scalar* values, std::size_t num_operands, std::size_t n,
               typename Vec::Scalar* lanes) {
  static constexpr DotTile<Vec> kDiagonalTiles[4] = {dot_tile<Vec, 1, 1, true>, dot_tile<Vec, 2, 2, true>,
                                                     dot_tile<Vec, 3, 3, true>, dot_tile<Vec, 4, 4, true>};
  const std::size_t row_stride = num_operands * kNumLanes;
  for (std::size_t i = 0; i < num_operands; i += 4) {
    const std::size_t rows = min_size(4, num_operands - i);
    const typename Vec::Scalar* a = values + i * kChunkNumel;
    kDiagonalTiles[rows - 1](a, a, n, lanes + i * row_stride + i * kNumLanes, row_stride);
    // Only the last rows are fewer than four, and nothing is behind them.
    if (i + 4 < num_operands) {
      dot_tiles<Vec>(a, a + 4 * kChunkNumel, num_operands - i - 4, n, lanes + i * row_stride + (i + 4) * kNumLanes,
                     row_stride);
    }
  }
}

// Where four operands get what is subtracted from them.
enum class Base { kNone, kFirstOperand, kStored };

// The same for up to four operands of one dtype, straight from memory: v_i live in registers only, which makes the sum
// keep up with one core's memory bandwidth (26 GB/s instead of 11, Zen 4, bf16, T = 3). Same order, same bits.
// `n` is a multiple of kNumLanes. With kKeeps, v_i are written to kept[i, :] as well, and `stored_base` is read.
template <class Vec, DType kDType, int kOperands, Base kBase, bool kKeeps>
MF_NOINLINE void dot_chunk_direct(const std::byte* const* src, std::size_t n, typename Vec::Scalar* lanes,
                                  std::size_t lanes_row_stride, const typename Vec::Scalar* stored_base,
                                  typename Vec::Scalar* kept) {
  using Reg = typename Vec::Reg;
  const std::byte* const src0 = src[0];
  const std::byte* const src1 = src[kOperands > 1 ? 1 : 0];
  const std::byte* const src2 = src[kOperands > 2 ? 2 : 0];
  const std::byte* const src3 = src[kOperands > 3 ? 3 : 0];
  for (std::size_t lane = 0; lane < kNumLanes; lane += Vec::kLanes) {
    // Named registers: GCC keeps arrays of them on the stack, which halves the speed.
    const auto lanes_of = [=](int r, int c) { return lanes + r * lanes_row_stride + c * kNumLanes + lane; };
    const auto load_sum = [=](int r, int c) { return c < kOperands ? Vec::load(lanes_of(r, c)) : Vec::zero(); };
    Reg sum00 = load_sum(0, 0), sum01 = load_sum(0, 1), sum02 = load_sum(0, 2), sum03 = load_sum(0, 3);
    Reg sum11 = load_sum(1, 1), sum12 = load_sum(1, 2), sum13 = load_sum(1, 3);
    Reg sum22 = load_sum(2, 2), sum23 = load_sum(2, 3);
    Reg sum33 = load_sum(3, 3);
    for (std::size_t e = lane; e < n; e += kNumLanes) {
      const std::size_t offset = e * kItemsize<kDType>;
      const auto load_x = [=](const std::byte* p) {
        prefetch_ahead<kKeeps>(p + offset);
        return Vec::template load_as<kDType>(p + offset);
      };
      const auto keep = [=](int i, Reg v) {
        if constexpr (kKeeps) Vec::store(kept + i * kChunkNumel + e, v);
      };
      const Reg base = kBase == Base::kStored ? Vec::load(stored_base + e) : Vec::zero();
      const Reg x0 = load_x(src0);
      const Reg v0 = kBase == Base::kStored ? Vec::sub(x0, base) : x0;
      const auto load_v = [=](const std::byte* p) {
        const Reg x = load_x(p);
        if constexpr (kBase == Base::kNone) return x;
        return Vec::sub(x, kBase == Base::kStored ? base : v0);
      };
      keep(0, v0);
      sum00 = Vec::fma(v0, v0, sum00);
      if constexpr (kOperands > 1) {
        const Reg v1 = load_v(src1);
        keep(1, v1);
        sum01 = Vec::fma(v0, v1, sum01);
        sum11 = Vec::fma(v1, v1, sum11);
        if constexpr (kOperands > 2) {
          const Reg v2 = load_v(src2);
          keep(2, v2);
          sum02 = Vec::fma(v0, v2, sum02);
          sum12 = Vec::fma(v1, v2, sum12);
          sum22 = Vec::fma(v2, v2, sum22);
          if constexpr (kOperands > 3) {
            const Reg v3 = load_v(src3);
            keep(3, v3);
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

using DirectDot = void (*)(const std::byte* const*, std::size_t, float*, std::size_t, const float*, float*);
constexpr std::size_t kFew = 4;

MF_INLINE void sources_at(const Operand* operands, std::size_t count, std::size_t offset, const std::byte** src) {
  for (std::size_t i = 0; i < count; ++i) src[i] = operands[i].data + offset;
}

// Vectors of fewer lanes than kNumLanes read a chunk more than once, so it has to fit the L1 cache.
constexpr std::size_t kDirectChunkNumel = VecF::kLanes == kNumLanes ? kBlockNumel : 1024;

// Operands taken four at a time are read in turns, so much of each.
constexpr std::size_t kFoursChunkNbytes = 1024;

template <DType kDType, Base kBase, bool kKeeps>
MF_INLINE DirectDot direct_dot(std::size_t num_operands) {
  static constexpr DirectDot kByOperands[kFew] = {
      dot_chunk_direct<VecF, kDType, 1, kBase, kKeeps>, dot_chunk_direct<VecF, kDType, 2, kBase, kKeeps>,
      dot_chunk_direct<VecF, kDType, 3, kBase, kKeeps>, dot_chunk_direct<VecF, kDType, 4, kBase, kKeeps>};
  return kByOperands[num_operands - 1];
}

// More operands, four at a time: the products among the four straight from memory, with the others from what is kept in
// `values`, which is [V + 1, kChunkNumel]. `n` is at most kChunkNumel.
template <DType kDType>
void dot_chunk_by_fours(const Operand* operands, std::size_t num_operands, bool has_base, std::size_t first,
                        std::size_t n, float* values, float* lanes) {
  const std::size_t row_stride = num_operands * kNumLanes;
  const float* base = values;
  if (!has_base) {
    float* zeros = values + num_operands * kChunkNumel;
    for (std::size_t e = 0; e < n; ++e) zeros[e] = 0;
    base = zeros;
  }
  for (std::size_t i = 0; i < num_operands; i += kFew) {
    const std::size_t count = min_size(kFew, num_operands - i);
    float* kept = values + i * kChunkNumel;
    const DirectDot dot = i > 0      ? direct_dot<kDType, Base::kStored, true>(count)
                          : has_base ? dot_chunk_direct<VecF, kDType, kFew, Base::kFirstOperand, true>
                                     : dot_chunk_direct<VecF, kDType, kFew, Base::kNone, true>;
    const std::byte* src[kFew] = {};
    sources_at(operands + i, count, first * kItemsize<kDType>, src);
    dot(src, n, lanes + i * (row_stride + kNumLanes), row_stride, base, kept);
    for (std::size_t j = 0; j < i; j += kFew) {
      dot_tiles<VecF>(values + j * kChunkNumel, kept, count, n, lanes + j * row_stride + i * kNumLanes, row_stride);
    }
  }
}

// Adds the products of a block of operands of one dtype, but for what is left of a multiple of kNumLanes. Returns the
// number of elements.
template <DType kDType>
std::size_t dot_block_direct(const Operand* operands, std::size_t num_operands, bool has_base, std::size_t first,
                             std::size_t numel, const Workspace& workspace) {
  auto* values = reinterpret_cast<float*>(workspace.values);
  auto* lanes = reinterpret_cast<float*>(workspace.lanes);
  const std::size_t n = numel / kNumLanes * kNumLanes;
  const bool is_few = num_operands <= kFew;
  const std::size_t step = is_few ? kDirectChunkNumel : kFoursChunkNbytes / kItemsize<kDType>;
  for (std::size_t done = 0; done < n; done += step) {
    const std::size_t count = min_size(step, n - done);
    if (is_few) {
      const std::byte* src[kFew] = {};
      sources_at(operands, num_operands, (first + done) * kItemsize<kDType>, src);
      const DirectDot dot = has_base ? direct_dot<kDType, Base::kFirstOperand, false>(num_operands)
                                     : direct_dot<kDType, Base::kNone, false>(num_operands);
      dot(src, count, lanes, num_operands * kNumLanes, nullptr, nullptr);
    } else {
      dot_chunk_by_fours<kDType>(operands, num_operands, has_base, first + done, count, values, lanes);
    }
  }
  return n;
}

// The same for any operands: 0 if they need the general path (mixed dtypes, F64).
MF_INLINE std::size_t dot_block_direct(const Operand* operands, std::size_t num_operands, bool has_base,
                                       std::size_t first, std::size_t numel, const Workspace& workspace) {
  if (!same_dtypes(operands, num_operands)) return 0;
  switch (operands[0].dtype) {
    case DType::kF32:
      return dot_block_direct<DType::kF32>(operands, num_operands, has_base, first, numel, workspace);
    case DType::kF16:
      return dot_block_direct<DType::kF16>(operands, num_operands, has_base, first, numel, workspace);
    case DType::kBF16:
      return dot_block_direct<DType::kBF16>(operands, num_operands, has_base, first, numel, workspace);
    case DType::kF64:
      return 0;
  }
  return 0;
}
