// layer_row_divergence for one instruction set; see vector_loops-inl.h for how this text is used.

// Lane sums of a block in the order of the contract: lane l += x[e] for e % 16 == l, ascending.
MF_INLINE void add_to_lanes(const double* x, std::size_t n, double* lanes) {
  std::size_t e = 0;
  for (; e + kNumLanes <= n; e += kNumLanes) {
    for (std::size_t l = 0; l < kNumLanes; ++l) lanes[l] += x[e + l];
  }
  for (std::size_t l = 0; e + l < n; ++l) lanes[l] += x[e + l];
}

MF_INLINE double sum_of_lanes(double* lanes) {
  for (std::size_t width = kNumLanes / 2; width > 0; width /= 2) {
    for (std::size_t l = 0; l < width; ++l) lanes[l] += lanes[l + width];
  }
  return lanes[0];
}

template <class Vec>
double max_of_span(Operand operand, std::size_t numel) {
  using Scalar = typename Vec::Scalar;
  alignas(64) Scalar x[kChunkNumel];
  Scalar lanes[kNumLanes];
  for (std::size_t l = 0; l < kNumLanes; ++l) lanes[l] = -Scalar(__builtin_inff());
  for (std::size_t first = 0; first < numel; first += kChunkNumel) {
    const std::size_t n = min_size(kChunkNumel, numel - first);
    Scalar* const values = x;
    for_each_vector<Vec>(operand, first, n, [=](std::size_t e, typename Vec::Reg v) { Vec::store(values + e, v); });
    std::size_t e = 0;
    for (; e + kNumLanes <= n; e += kNumLanes) {
      for (std::size_t l = 0; l < kNumLanes; ++l) lanes[l] = x[e + l] > lanes[l] ? x[e + l] : lanes[l];
    }
    for (std::size_t l = 0; e + l < n; ++l) lanes[l] = x[e + l] > lanes[l] ? x[e + l] : lanes[l];
  }
  for (std::size_t l = 1; l < kNumLanes; ++l) lanes[0] = lanes[l] > lanes[0] ? lanes[l] : lanes[0];
  return static_cast<double>(lanes[0]);
}

double row_max(Operand operand, std::size_t numel) {
  return operand.dtype == DType::kF64 ? max_of_span<VecD>(operand, numel) : max_of_span<VecF>(operand, numel);
}

// out[e] = exp(x[first + e] − max). `out` has room for round_up(n, kNumLanes).
MF_NOINLINE void exp_chunk(Operand operand, std::size_t first, std::size_t n, double max, double* out) {
  for_each_vector<VecD>(operand, first, n, [=](std::size_t e, VecD::Reg x) { VecD::store(out + e, x); });
  for (std::size_t e = 0; e < n; ++e) out[e] = exp_nonpositive(out[e] - max);
}

double row_exp_sum(Operand operand, std::size_t numel, double max, double* exps) {
  alignas(64) double buffer[kChunkNumel];
  double sum = 0;
  for (std::size_t block = 0; block < numel; block += kBlockNumel) {
    const std::size_t end = min_size(block + kBlockNumel, numel);
    double lanes[kNumLanes] = {};
    for (std::size_t first = block; first < end; first += kChunkNumel) {
      const std::size_t n = min_size(kChunkNumel, end - first);
      double* out = exps == nullptr ? buffer : exps + first;
      exp_chunk(operand, first, n, max, out);
      add_to_lanes(out, n, lanes);
    }
    sum += sum_of_lanes(lanes);
  }
  return sum;
}

MF_NOINLINE void divergence_chunk(const double* __restrict base, const double* __restrict model, std::size_t n,
                                  double base_scale, double model_scale, double* __restrict terms) {
  for (std::size_t e = 0; e < n; ++e) {
    const double p = __builtin_fma(model[e], model_scale, kSoftmaxEpsilon);
    const double q = __builtin_fma(base[e], base_scale, kSoftmaxEpsilon);
    terms[e] = divergence_term(p, q);
  }
}

double row_divergence(const Operand* operands, std::size_t numel, const Softmax* softmax) {
  alignas(64) double base[kChunkNumel];
  alignas(64) double model[kChunkNumel];
  alignas(64) double terms[kChunkNumel];
  double sum = 0;
  for (std::size_t block = 0; block < numel; block += kBlockNumel) {
    const std::size_t end = min_size(block + kBlockNumel, numel);
    double lanes[kNumLanes] = {};
    for (std::size_t first = block; first < end; first += kChunkNumel) {
      const std::size_t n = min_size(kChunkNumel, end - first);
      if (softmax[0].exps == nullptr) {
        exp_chunk(operands[0], first, n, softmax[0].max, base);
        exp_chunk(operands[1], first, n, softmax[1].max, model);
      }
      divergence_chunk(softmax[0].exps == nullptr ? base : softmax[0].exps + first,
                       softmax[1].exps == nullptr ? model : softmax[1].exps + first, n, softmax[0].scale,
                       softmax[1].scale, terms);
      add_to_lanes(terms, n, lanes);
    }
    sum += sum_of_lanes(lanes);
  }
  return sum;
}
