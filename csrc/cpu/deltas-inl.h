// Task vectors and the keys that their elements are ranked by; see vector_loops-inl.h for how this text is used.

template <class Scalar>
MF_INLINE Scalar* row_of(std::byte* rows, std::size_t index) {
  return reinterpret_cast<Scalar*>(rows) + index * kChunkNumel;
}

// Fetches the operand's next chunk while this one is worked on, which takes longer than memory: the processor's own
// prefetching begins anew in every chunk, because the operands are read in turns.
MF_INLINE void prefetch_chunk(Operand operand, std::size_t offset) {
  const std::size_t size = itemsize(operand.dtype);
  const std::byte* next = operand.data + offset * size;
  for (std::size_t i = 0; i < kChunkNumel * size; i += 64) __builtin_prefetch(next + i);
}

// base[0 .. n) = the base's elements [offset, offset + n), and zeros up to a multiple of kNumLanes.
template <class Vec>
void load_base(const Operand* operands, std::size_t offset, std::size_t n, typename Vec::Scalar* base) {
  if (n == kChunkNumel) prefetch_chunk(operands[0], offset + n);
  for_each_vector<Vec>(operands[0], offset, n, [=](std::size_t e, typename Vec::Reg x) { Vec::store(base + e, x); });
  for (std::size_t e = round_up(n, Vec::kLanes); e < round_up(n, kNumLanes); ++e) base[e] = 0;
}

// delta[0 .. n) = model − base, and zeros up to a multiple of kNumLanes.
template <class Vec>
void load_delta(Operand model, std::size_t offset, std::size_t n, const typename Vec::Scalar* base,
                typename Vec::Scalar* delta) {
  if (n == kChunkNumel) prefetch_chunk(model, offset + n);
  for_each_vector<Vec>(model, offset, n, [=](std::size_t e, typename Vec::Reg x) {
    Vec::store(delta + e, Vec::sub(x, Vec::load(base + e)));
  });
  for (std::size_t e = round_up(n, Vec::kLanes); e < round_up(n, kNumLanes); ++e) delta[e] = 0;
}

template <class Vec>
void load_deltas(const Operand* operands, std::size_t num_models, std::size_t offset, std::size_t n,
                 const SparseRows& rows) {
  using Scalar = typename Vec::Scalar;
  auto* base = row_of<Scalar>(rows.base, 0);
  load_base<Vec>(operands, offset, n, base);
  for (std::size_t t = 0; t < num_models; ++t) {
    load_delta<Vec>(operands[1 + t], offset, n, base, row_of<Scalar>(rows.deltas, t));
  }
}

MF_INLINE std::uint32_t key_of(float x) {
  const std::uint32_t bits = __builtin_bit_cast(std::uint32_t, x) & 0x7fffffffu;
  return bits < kNanKey ? bits : kNanKey;
}

template <class Scalar>
void magnitude_keys(const Scalar* delta, std::size_t n, std::uint32_t* keys) {
  for (std::size_t e = 0; e < n; ++e) keys[e] = key_of(static_cast<float>(delta[e]));
}

// T² times the population variance over the models, T Σd² − (Σd)² with d_t = δ_t − δ_0, in fp64, in the order of the
// models: exactly 0 where they agree.
template <class Scalar>
MF_NOINLINE void variance_keys(std::byte* deltas, std::size_t num_models, std::size_t n, double* sum, double* squares,
                               std::uint32_t* keys) {
  const Scalar* origin = row_of<Scalar>(deltas, 0);
  for (std::size_t e = 0; e < n; ++e) sum[e] = squares[e] = 0;
  for (std::size_t t = 1; t < num_models; ++t) {
    const Scalar* delta = row_of<Scalar>(deltas, t);
    for (std::size_t e = 0; e < n; ++e) {
      const double difference = static_cast<double>(delta[e]) - static_cast<double>(origin[e]);
      sum[e] += difference;
      squares[e] += difference * difference;
    }
  }
  const auto count = static_cast<double>(num_models);
  for (std::size_t e = 0; e < n; ++e) keys[e] = key_of(static_cast<float>(count * squares[e] - sum[e] * sum[e]));
}

// The same in fp32 for few models, in registers.
template <int kModels>
MF_NOINLINE void variance_keys(const float* deltas, std::size_t n, std::uint32_t* keys) {
  constexpr std::size_t kStep = 4;
  const F64x4 count = F64x4{} + static_cast<double>(kModels);
  const I32x4 nan_key = I32x4{} + static_cast<std::int32_t>(kNanKey);
  for (std::size_t e = 0; e < n; e += kStep) {
    F32x4 delta;
    load_wide(deltas + e, delta);
    const F64x4 origin = __builtin_convertvector(delta, F64x4);
    F64x4 sum = {};
    F64x4 squares = {};
    for (int t = 1; t < kModels; ++t) {
      load_wide(deltas + static_cast<std::size_t>(t) * kChunkNumel + e, delta);
      const F64x4 difference = __builtin_convertvector(delta, F64x4) - origin;
      sum = sum + difference;
      squares = squares + difference * difference;
    }
    const F32x4 spread = __builtin_convertvector(count * squares - sum * sum, F32x4);
    const I32x4 bits = (I32x4)spread & 0x7fffffff;
    const I32x4 is_nan = bits > nan_key;
    store_wide(keys + e, (bits & ~is_nan) | (nan_key & is_nan));
  }
}

template <class Scalar>
MF_INLINE void keys_of_variance(const SparseRows& rows, std::size_t num_models, std::size_t n, std::uint32_t* keys) {
  if constexpr (sizeof(Scalar) == 4) {
    const float* deltas = row_of<float>(rows.deltas, 0);
    if (num_models == 2) return variance_keys<2>(deltas, n, keys);
    if (num_models == 3) return variance_keys<3>(deltas, n, keys);
    if (num_models == 4) return variance_keys<4>(deltas, n, keys);
  }
  variance_keys<Scalar>(rows.deltas, num_models, n, rows.sums, rows.sums + kChunkNumel, keys);
}

// `first` is the element of the tensor that delta[0] is.
template <class Scalar>
void importance_keys(const Scalar* delta, std::size_t first, std::size_t n, const KeyRule& rule, std::uint32_t* keys) {
  for (std::size_t done = 0; done < n;) {
    const std::size_t row = (first + done) / rule.columns;
    const std::size_t end = min_size(n, (row + 1) * rule.columns - first);
    const double factor = rule.row_factors[row];
    for (; done < end; ++done) keys[done] = key_of(static_cast<float>(static_cast<double>(delta[done]) * factor));
  }
}

// keys[0 .. n) of a chunk whose deltas are loaded; padded to a multiple of kNumLanes with anything.
template <class Scalar>
void chunk_keys(const SparseRows& rows, std::size_t num_models, std::size_t model, std::size_t first, std::size_t n,
                const KeyRule& rule, std::uint32_t* keys) {
  const Scalar* delta = row_of<Scalar>(rows.deltas, model);
  switch (rule.kind) {
    case KeyKind::kMagnitude:
      return magnitude_keys<Scalar>(delta, n, keys);
    case KeyKind::kVariance:
      return keys_of_variance<Scalar>(rows, num_models, n, keys);
    case KeyKind::kImportance:
      return importance_keys<Scalar>(delta, first, n, rule, keys);
  }
}

template <class Vec>
void compute_keys(const Operand* operands, std::size_t num_models, std::size_t model, std::size_t offset,
                  std::size_t first, std::size_t numel, const KeyRule& rule, const SparseRows& rows,
                  std::uint32_t* keys) {
  using Scalar = typename Vec::Scalar;
  for (std::size_t done = 0; done < numel; done += kChunkNumel) {
    const std::size_t n = min_size(kChunkNumel, numel - done);
    if (rule.kind == KeyKind::kVariance) {
      load_deltas<Vec>(operands, num_models, offset + done, n, rows);
    } else {
      auto* base = row_of<Scalar>(rows.base, 0);
      load_base<Vec>(operands, offset + done, n, base);
      load_delta<Vec>(operands[1 + model], offset + done, n, base, row_of<Scalar>(rows.deltas, model));
    }
    chunk_keys<Scalar>(rows, num_models, model, first + done, n, rule, keys + done);
  }
}

void keys_span(const Operand* operands, std::size_t num_models, std::size_t model, std::size_t offset,
               std::size_t first, std::size_t numel, const KeyRule& rule, const SparseRows& rows, std::uint32_t* keys) {
  const auto compute = any_f64(operands, 1 + num_models) ? compute_keys<VecD> : compute_keys<VecF>;
  compute(operands, num_models, model, offset, first, numel, rule, rows, keys);
}
