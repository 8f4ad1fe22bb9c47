// layer_gram for one instruction set; see vector_loops-inl.h for how this text is used.

// values[i, :] = v_i for the chunk [first, first + n), padded with zeros to a multiple of kNumLanes.
template <class Vec>
void load_chunk(const Operand* operands, std::size_t num_operands, bool has_base, std::size_t first, std::size_t n,
                typename Vec::Scalar* values) {
  for (std::size_t i = 0; i < num_operands; ++i) {
    typename Vec::Scalar* out = values + i * kChunkNumel;
    if (has_base && i > 0) {
      const typename Vec::Scalar* base = values;
      for_each_vector<Vec, true>(operands[i], first, n, [=](std::size_t e, typename Vec::Reg x) {
        Vec::store(out + e, Vec::sub(x, Vec::load(base + e)));
      });
    } else {
      for_each_vector<Vec, true>(operands[i], first, n,
                                 [=](std::size_t e, typename Vec::Reg x) { Vec::store(out + e, x); });
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
    done = dot_block_direct(operands, num_operands, has_base, first, numel, workspace);
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
