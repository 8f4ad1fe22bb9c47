// layer_merge for one instruction set; see vector_loops-inl.h for how this text is used.

// The least magnitude that becomes Inf when rounded to the dtype.
template <class Scalar>
MF_INLINE Scalar overflow_threshold(DType dtype) {
  switch (dtype) {
    case DType::kF16:
      return Scalar(65520);
    case DType::kBF16:
      return Scalar(0x1.ffp+127);
    case DType::kF32:
      return sizeof(Scalar) == 8 ? Scalar(0x1.ffffffp+127) : Scalar(__builtin_inff());
    case DType::kF64:
      return Scalar(__builtin_inf());
  }
  return 0;
}

// Rounds sums[0 .. n) to the output dtype. Returns how many become NaN or Inf.
template <class Vec, DType kDType>
MF_INLINE std::size_t store_chunk(const typename Vec::Scalar* sums, std::size_t n, std::byte* out) {
  const typename Vec::Scalar threshold = overflow_threshold<typename Vec::Scalar>(kDType);
  const typename Vec::Reg limit = Vec::broadcast(threshold);
  std::size_t num_nonfinite = 0;
  std::size_t i = 0;
  for (; i + Vec::kLanes <= n; i += Vec::kLanes) {
    const typename Vec::Reg x = Vec::load(sums + i);
    num_nonfinite += Vec::count_not_below(x, limit);
    Vec::template store_as<kDType>(out + i * kItemsize<kDType>, x);
  }
  if (i < n) {
    alignas(64) std::byte tail[Vec::kLanes * sizeof(double)];
    Vec::template store_as<kDType>(tail, Vec::load(sums + i));
    __builtin_memcpy(out + i * kItemsize<kDType>, tail, (n - i) * kItemsize<kDType>);
    for (; i < n; ++i) num_nonfinite += !(sums[i] < threshold && sums[i] > -threshold);
  }
  return num_nonfinite;
}

template <class Vec>
MF_INLINE std::size_t store_chunk(const typename Vec::Scalar* sums, std::size_t n, std::byte* out, DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return store_chunk<Vec, DType::kF32>(sums, n, out);
    case DType::kF16:
      return store_chunk<Vec, DType::kF16>(sums, n, out);
    case DType::kBF16:
      return store_chunk<Vec, DType::kBF16>(sums, n, out);
    case DType::kF64:
      if constexpr (sizeof(typename Vec::Scalar) == 8) return store_chunk<Vec, DType::kF64>(sums, n, out);
      return 0;
  }
  return 0;
}

// Elements [first, first + n), n <= kChunkNumel. `coefficients_of(t)(e)` is the vector of coefficients of model t at
// element first + e; `base` has room for two chunks.
template <class Vec, class Coefficients>
MF_INLINE std::size_t merge_chunk(const Operand* operands, std::size_t num_operands, bool has_base, std::size_t first,
                                  std::size_t n, Coefficients coefficients_of, typename Vec::Scalar* base,
                                  std::byte* out, DType out_dtype) {
  using Scalar = typename Vec::Scalar;
  using Reg = typename Vec::Reg;
  Scalar* sums = base + kChunkNumel;
  if (has_base) {
    for_each_vector<Vec>(operands[0], first, n, [=](std::size_t e, Reg x) {
      Vec::store(base + e, x);
      Vec::store(sums + e, x);
    });
  } else {
    for (std::size_t e = 0; e < round_up(n, Vec::kLanes); ++e) {
      base[e] = 0;
      sums[e] = -Scalar(0);  // c·x + (−0) is c·x for either sign of zero
    }
  }
  for (std::size_t t = has_base; t < num_operands; ++t) {
    const auto coefficient = coefficients_of(t - has_base);
    for_each_vector<Vec>(operands[t], first, n, [=](std::size_t e, Reg x) {
      const Reg delta = Vec::sub(x, Vec::load(base + e));
      Vec::store(sums + e, Vec::fma(coefficient(e), delta, Vec::load(sums + e)));
    });
  }
  return store_chunk<Vec>(sums, n, out + first * itemsize(out_dtype), out_dtype);
}

// Elements [first, numel).
template <class Vec>
std::size_t merge_general(const Operand* operands, std::size_t num_operands, bool has_base, std::size_t first,
                          std::size_t numel, const double* coefficients, const Workspace& workspace, std::byte* out,
                          DType out_dtype) {
  using Scalar = typename Vec::Scalar;
  auto* base = reinterpret_cast<Scalar*>(workspace.values);
  const auto coefficients_of = [=](std::size_t t) {
    const typename Vec::Reg c = Vec::broadcast(static_cast<Scalar>(coefficients[t]));
    return [=](std::size_t) { return c; };
  };
  std::size_t num_nonfinite = 0;
  for (; first < numel; first += kChunkNumel) {
    num_nonfinite += merge_chunk<Vec>(operands, num_operands, has_base, first, min_size(kChunkNumel, numel - first),
                                      coefficients_of, base, out, out_dtype);
  }
  return num_nonfinite;
}

// The number of models is known at run time only.
constexpr int kManyModels = 0;

// The same for operands of one dtype, straight from memory to memory, with the sum in a register. Same order, same
// bits. `n` is a multiple of Vec::kLanes. Returns the number of NaN and Inf written.
template <class Vec, DType kDType, DType kOutDType, bool kHasBase, int kModels>
MF_NOINLINE std::size_t merge_direct(const Operand* operands, std::size_t num_models, std::size_t n, const float* c,
                                     std::byte* out) {
  using Reg = typename Vec::Reg;
  const Operand* models = operands + kHasBase;
  const std::byte* const base = operands[0].data;
  const std::byte* const model0 = models[0].data;
  const std::byte* const model1 = models[kModels > 1 ? 1 : 0].data;
  const std::byte* const model2 = models[kModels > 2 ? 2 : 0].data;
  const std::byte* const model3 = models[kModels > 3 ? 3 : 0].data;
  const Reg c0 = Vec::broadcast(c[0]);
  const Reg c1 = Vec::broadcast(c[kModels > 1 ? 1 : 0]);
  const Reg c2 = Vec::broadcast(c[kModels > 2 ? 2 : 0]);
  const Reg c3 = Vec::broadcast(c[kModels > 3 ? 3 : 0]);
  const Reg limit = Vec::broadcast(overflow_threshold<float>(kOutDType));
  std::size_t num_nonfinite = 0;
  for (std::size_t e = 0; e < n; e += Vec::kLanes) {
    const std::size_t offset = e * kItemsize<kDType>;
    const auto load = [=](const std::byte* p) {
      __builtin_prefetch(p + offset + kPrefetchNbytes);
      return Vec::template load_as<kDType>(p + offset);
    };
    const Reg b = kHasBase ? load(base) : Vec::zero();
    const auto delta = [=](const std::byte* p) { return kHasBase ? Vec::sub(load(p), b) : load(p); };
    Reg sum = Vec::fma(c0, delta(model0), kHasBase ? b : Vec::broadcast(-0.0f));
    if constexpr (kModels > 1) sum = Vec::fma(c1, delta(model1), sum);
    if constexpr (kModels > 2) sum = Vec::fma(c2, delta(model2), sum);
    if constexpr (kModels > 3) sum = Vec::fma(c3, delta(model3), sum);
    for (std::size_t t = 1; kModels == kManyModels && t < num_models; ++t) {
      sum = Vec::fma(Vec::broadcast(c[t]), delta(models[t].data), sum);
    }
    num_nonfinite += Vec::count_not_below(sum, limit);
    Vec::template store_as<kOutDType>(out + e * kItemsize<kOutDType>, sum);
  }
  return num_nonfinite;
}

// Up to so many models have registers of their own.
constexpr std::size_t kMaxFewModels = 4;
using DirectMerge = std::size_t (*)(const Operand*, std::size_t, std::size_t, const float*, std::byte*);

template <DType kDType, DType kOutDType, bool kHasBase>
DirectMerge direct_merge(std::size_t num_models) {
  static constexpr DirectMerge kByModels[1 + kMaxFewModels] = {
      merge_direct<VecF, kDType, kOutDType, kHasBase, kManyModels>, merge_direct<VecF, kDType, kOutDType, kHasBase, 1>,
      merge_direct<VecF, kDType, kOutDType, kHasBase, 2>, merge_direct<VecF, kDType, kOutDType, kHasBase, 3>,
      merge_direct<VecF, kDType, kOutDType, kHasBase, 4>};
  return kByModels[num_models <= kMaxFewModels ? num_models : kManyModels];
}

template <DType kDType, DType kOutDType>
DirectMerge direct_merge(std::size_t num_models, bool has_base) {
  return has_base ? direct_merge<kDType, kOutDType, true>(num_models)
                  : direct_merge<kDType, kOutDType, false>(num_models);
}

// The direct kernel for these operands, or null if they need the general one. It exists for outputs in the inputs'
// dtype and in F32, the two that people ask for.
MF_INLINE DirectMerge find_direct_merge(const Operand* operands, std::size_t num_operands, bool has_base,
                                        DType out_dtype) {
  const std::size_t num_models = num_operands - has_base;
  if (!same_dtypes(operands, num_operands)) return nullptr;
  const DType dtype = operands[0].dtype;
  if (dtype == DType::kF32 && out_dtype == DType::kF32) {
    return direct_merge<DType::kF32, DType::kF32>(num_models, has_base);
  }
  if (dtype == DType::kF16 && out_dtype == DType::kF16) {
    return direct_merge<DType::kF16, DType::kF16>(num_models, has_base);
  }
  if (dtype == DType::kF16 && out_dtype == DType::kF32) {
    return direct_merge<DType::kF16, DType::kF32>(num_models, has_base);
  }
  if (dtype == DType::kBF16 && out_dtype == DType::kBF16) {
    return direct_merge<DType::kBF16, DType::kBF16>(num_models, has_base);
  }
  if (dtype == DType::kBF16 && out_dtype == DType::kF32) {
    return direct_merge<DType::kBF16, DType::kF32>(num_models, has_base);
  }
  return nullptr;
}

std::size_t merge_span(const Operand* operands, std::size_t num_operands, bool has_base, std::size_t numel,
                       const double* coefficients, const Workspace& workspace, std::byte* out, DType out_dtype) {
  const DirectMerge direct = find_direct_merge(operands, num_operands, has_base, out_dtype);
  if (direct == nullptr) {
    const bool in_fp64 = out_dtype == DType::kF64 || any_f64(operands, num_operands);
    const auto merge = in_fp64 ? merge_general<VecD> : merge_general<VecF>;
    return merge(operands, num_operands, has_base, 0, numel, coefficients, workspace, out, out_dtype);
  }
  const std::size_t num_models = num_operands - has_base;
  auto* c = reinterpret_cast<float*>(workspace.values);
  for (std::size_t t = 0; t < num_models; ++t) c[t] = static_cast<float>(coefficients[t]);
  const std::size_t n = numel / VecF::kLanes * VecF::kLanes;
  const std::size_t num_nonfinite = direct(operands, num_models, n, c, out);
  return num_nonfinite +
         merge_general<VecF>(operands, num_operands, has_base, n, numel, coefficients, workspace, out, out_dtype);
}
