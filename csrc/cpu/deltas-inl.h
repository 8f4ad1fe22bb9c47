// Task vectors and the keys that their elements are ranked by; see vector_loops-inl.h for how this text is used.

template <class Scalar>
MF_INLINE Scalar* row_of(std::byte* rows, std::size_t index) {
  return reinterpret_cast<Scalar*>(rows) + index * kChunkNumel;
}

// base[0 .. n) = the base's elements [offset, offset + n), and zeros up to a multiple of kNumLanes.
template <class Vec>
void load_base(const Operand* operands, std::size_t offset, std::size_t n, typename Vec::Scalar* base) {
  for_each_vector<Vec>(operands[0], offset, n, [=](std::size_t e, typename Vec::Reg x) { Vec::store(base + e, x); });
  for (std::size_t e = round_up(n, Vec::kLanes); e < round_up(n, kNumLanes); ++e) base[e] = 0;
}

// delta[0 .. n) = model − base, and zeros up to a multiple of kNumLanes.
template <class Vec>
void load_delta(Operand model, std::size_t offset, std::size_t n, const typename Vec::Scalar* base,
                typename Vec::Scalar* delta) {
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

// Population variance over the models: mean and sum in fp64, in the order of the models.
template <class Scalar>
void variance_keys(std::byte* deltas, std::size_t num_models, std::size_t n, double* mean, double* sum,
                   std::uint32_t* keys) {
  const auto count = static_cast<double>(num_models);
  for (std::size_t e = 0; e < n; ++e) mean[e] = static_cast<double>(row_of<Scalar>(deltas, 0)[e]);
  for (std::size_t t = 1; t < num_models; ++t) {
    const Scalar* delta = row_of<Scalar>(deltas, t);
    for (std::size_t e = 0; e < n; ++e) mean[e] += static_cast<double>(delta[e]);
  }
  for (std::size_t e = 0; e < n; ++e) mean[e] /= count;
  for (std::size_t e = 0; e < n; ++e) sum[e] = 0;
  for (std::size_t t = 0; t < num_models; ++t) {
    const Scalar* delta = row_of<Scalar>(deltas, t);
    for (std::size_t e = 0; e < n; ++e) {
      const double deviation = static_cast<double>(delta[e]) - mean[e];
      sum[e] += deviation * deviation;
    }
  }
  for (std::size_t e = 0; e < n; ++e) keys[e] = key_of(static_cast<float>(sum[e] / count));
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
      return variance_keys<Scalar>(rows.deltas, num_models, n, rows.sums, rows.sums + kChunkNumel, keys);
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
