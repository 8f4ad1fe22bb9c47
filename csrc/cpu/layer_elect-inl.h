// layer_elect for one instruction set; see vector_loops-inl.h for how this text is used.

// out[e] = (factor · δ) · m, 0 where the element is dropped.
template <class Scalar, bool kWeighted>
MF_NOINLINE void masked_terms(const Scalar* delta, const std::uint32_t* mask, const double* weights, double factor,
                              std::size_t n, double* __restrict out) {
  for (std::size_t e = 0; e < n; ++e) {
    const double term = factor * static_cast<double>(delta[e]);
    const double weighted = kWeighted ? term * weights[e] : term;
    out[e] = mask[e] != 0 ? weighted : 0.0;
  }
}

template <class Scalar>
MF_INLINE void model_terms(const SparseRun& run, const SparseRows& rows, std::size_t t, double factor, std::size_t n,
                           double* out) {
  const auto compute = run.masks[t].kind == MaskKind::kNear ? masked_terms<Scalar, true> : masked_terms<Scalar, false>;
  compute(row_of<Scalar>(rows.deltas, t), rows.masks + t * kChunkNumel, rows.weights + t * kChunkNumel, factor, n, out);
}

struct ElectRows {
  double* terms;
  double* votes;
  double* total;    // numerator
  double* divisor;  // sum of weights
  std::uint32_t* num_counting;
  double* unique;
};

// Adds one model's terms where it counts: where it is kept, or where its sign is the elected one. A NaN counts.
MF_NOINLINE void add_terms(const ElectRows& rows, const std::uint32_t* mask, bool elects, double weight, double unique,
                           std::size_t n) {
  for (std::size_t e = 0; e < n; ++e) {
    const double x = rows.terms[e];
    const bool agrees = rows.votes[e] >= 0 ? !(x <= 0) : !(x >= 0);
    const bool counts = elects ? agrees : mask[e] != 0;
    rows.total[e] += counts ? x : 0.0;
    rows.divisor[e] += counts ? weight : 0.0;
    rows.num_counting[e] += counts ? 1 : 0;
    rows.unique[e] = counts ? unique : rows.unique[e];
  }
}

// out[e] = base + λ · total / divisor, in the arithmetic of the deltas; the base as it is where that changes nothing.
template <class Scalar>
MF_NOINLINE void finish_chunk(const ElectRows& rows, const ElectionRule& rule, const Scalar* base, std::size_t n,
                              Scalar* out) {
  for (std::size_t e = 0; e < n; ++e) {
    const double total = rows.num_counting[e] == 1 ? rows.total[e] * rows.unique[e] : rows.total[e];
    double divisor = rule.normalizes && rows.divisor[e] != 0 ? rows.divisor[e] : 1.0;
    divisor = rule.floor > 0 && divisor < rule.floor ? rule.floor : divisor;
    const auto change = static_cast<Scalar>(rule.lambda * (total / divisor));
    const Scalar sum = base[e] + change;
    out[e] = change == 0 ? base[e] : sum;
  }
}

MF_INLINE bool votes_differ(const ElectionRule& rule, std::size_t num_models) {
  for (std::size_t t = 0; t < num_models; ++t) {
    if (rule.votes[t] != rule.scales[t]) return true;
  }
  return false;
}

// The same for up to kMaxFastModels models in fp32 whose masks are 0 or 1 and where no element has a factor of its own:
// everything in registers, in the same order.
template <int kModels, bool kElects>
MF_NOINLINE void elect_chunk(const SparseRows& rows, const ElectionRule& rule, std::size_t n, float* __restrict out) {
  constexpr std::size_t kStep = 4;
  const auto* base = row_of<float>(rows.base, 0);
  const auto* deltas = row_of<float>(rows.deltas, 0);
  const std::uint32_t* masks = rows.masks;
  const F64x4 zero = {};
  const F64x4 one = zero + 1.0;
  const F64x4 lambda = zero + rule.lambda;
  const F64x4 floor = zero + rule.floor;
  const bool has_votes = votes_differ(rule, kModels);
  const bool has_floor = rule.floor > 0;
  const bool normalizes = rule.normalizes;
  F64x4 scales[kModels], vote_scales[kModels], weights[kModels];
  for (int t = 0; t < kModels; ++t) {
    scales[t] = zero + rule.scales[t];
    vote_scales[t] = zero + rule.votes[t];
    weights[t] = zero + rule.weights[t];
  }
  for (std::size_t e = 0; e < n; e += kStep) {
    F64x4 terms[kModels];
    I64x4 counts[kModels];
    F64x4 votes = zero;
    for (int t = 0; t < kModels; ++t) {
      I32x4 bits, mask;
      load_wide(deltas + t * kChunkNumel + e, bits);
      load_wide(masks + t * kChunkNumel + e, mask);
      F64x4 delta;
      VecF::widen((F32x4)(bits & mask), delta);
      terms[t] = delta * scales[t];
      if (kElects) {
        votes = votes + (has_votes ? delta * vote_scales[t] : terms[t]);
      } else {
        counts[t] = __builtin_convertvector(mask, I64x4);
      }
    }
    const I64x4 is_positive = votes >= zero;
    F64x4 total = zero;
    F64x4 divisor = zero;
    for (int t = 0; t < kModels; ++t) {
      if (kElects) {
        // A NaN counts: it is neither below nor above zero.
        counts[t] = ~(((I64x4)(terms[t] <= zero) & is_positive) | ((I64x4)(terms[t] >= zero) & ~is_positive));
      }
      total = total + (F64x4)((I64x4)terms[t] & counts[t]);
      divisor = divisor + (F64x4)((I64x4)weights[t] & counts[t]);
    }
    if (normalizes) {
      const I64x4 is_zero = divisor == zero;
      divisor = (F64x4)(((I64x4)one & is_zero) | ((I64x4)divisor & ~is_zero));
    } else {
      divisor = one;
    }
    if (has_floor) {
      const I64x4 is_below = divisor < floor;
      divisor = (F64x4)(((I64x4)floor & is_below) | ((I64x4)divisor & ~is_below));
    }
    const F32x4 change = __builtin_convertvector((total / divisor) * lambda, F32x4);
    F32x4 origin;
    load_wide(base + e, origin);
    const I32x4 is_same = change == F32x4{};
    const F32x4 sum = origin + change;
    store_wide(out + e, (I32x4)(((I32x4)origin & is_same) | ((I32x4)sum & ~is_same)));
  }
}

// The same where terms are added up and not divided: what counts on either side of zero, then the side that is elected.
template <int kModels, bool kElects, bool kHasVotes>
MF_NOINLINE void elect_sum_chunk(const SparseRows& rows, const ElectionRule& rule, std::size_t n,
                                 float* __restrict out) {
  constexpr std::size_t kStep = 4;
  const auto* base = row_of<float>(rows.base, 0);
  const auto* deltas = row_of<float>(rows.deltas, 0);
  const std::uint32_t* masks = rows.masks;
  const F64x4 zero = {};
  const F64x4 lambda = zero + rule.lambda;
  F64x4 scales[kModels], vote_scales[kModels];
  for (int t = 0; t < kModels; ++t) {
    scales[t] = zero + rule.scales[t];
    vote_scales[t] = zero + rule.votes[t];
  }
  for (std::size_t e = 0; e < n; e += kStep) {
    F64x4 votes = zero;
    F64x4 above = zero;  // or all, without an election
    F64x4 below = zero;
    for (int t = 0; t < kModels; ++t) {
      I32x4 bits, mask;
      load_wide(deltas + t * kChunkNumel + e, bits);
      load_wide(masks + t * kChunkNumel + e, mask);
      F64x4 delta;
      VecF::widen((F32x4)(bits & mask), delta);
      const F64x4 term = delta * scales[t];
      if (kElects) {
        votes = votes + (kHasVotes ? delta * vote_scales[t] : term);
        // A NaN counts on both sides.
        above = above + (zero > term ? zero : term);
        below = below + (zero < term ? zero : term);
      } else {
        above = above + (F64x4)((I64x4)term & __builtin_convertvector(mask, I64x4));
      }
    }
    const F64x4 total = !kElects ? above : votes >= zero ? above : below;
    const F32x4 change = __builtin_convertvector(total * lambda, F32x4);
    F32x4 origin;
    load_wide(base + e, origin);
    const F32x4 sum = origin + change;
    store_wide(out + e, change == F32x4{} ? origin : sum);
  }
}

constexpr std::size_t kMaxFastModels = 4;
using ElectChunk = void (*)(const SparseRows&, const ElectionRule&, std::size_t, float*);

// The fast kernel for this run in fp32, or null.
MF_INLINE ElectChunk find_elect_chunk(const SparseRun& run, const ElectionRule& rule) {
  static constexpr ElectChunk kByModels[2][kMaxFastModels] = {
      {elect_chunk<1, false>, elect_chunk<2, false>, elect_chunk<3, false>, elect_chunk<4, false>},
      {elect_chunk<1, true>, elect_chunk<2, true>, elect_chunk<3, true>, elect_chunk<4, true>}};
  if (run.num_models > kMaxFastModels) return nullptr;
  for (std::size_t t = 0; t < run.num_models; ++t) {
    if (run.masks[t].kind == MaskKind::kNear || rule.uniques[t] != 1) return nullptr;
  }
  static constexpr ElectChunk kSumsByModels[3][kMaxFastModels] = {
      {elect_sum_chunk<1, false, false>, elect_sum_chunk<2, false, false>, elect_sum_chunk<3, false, false>,
       elect_sum_chunk<4, false, false>},
      {elect_sum_chunk<1, true, false>, elect_sum_chunk<2, true, false>, elect_sum_chunk<3, true, false>,
       elect_sum_chunk<4, true, false>},
      {elect_sum_chunk<1, true, true>, elect_sum_chunk<2, true, true>, elect_sum_chunk<3, true, true>,
       elect_sum_chunk<4, true, true>}};
  const std::size_t last = run.num_models - 1;
  if (!rule.normalizes && !(rule.floor > 1)) {
    return kSumsByModels[!rule.elects ? 0 : votes_differ(rule, run.num_models) ? 2 : 1][last];
  }
  return kByModels[rule.elects ? 1 : 0][last];
}

// Whether all there is to do is base + λ (scale · δ) m for one model with a near mask, as NearSwap has it.
MF_INLINE bool is_near_alone(const SparseRun& run, const ElectionRule& rule) {
  return run.num_models == 1 && run.masks[0].kind == MaskKind::kNear && !rule.elects && !rule.normalizes &&
         !(rule.floor > 0) && rule.uniques[0] == 1;
}

// That in fp32, in registers: near_mask, masked_terms and finish_chunk in one.
MF_NOINLINE void near_chunk(const SparseRows& rows, double value, const ElectionRule& rule, std::size_t n,
                            float* __restrict out) {
  constexpr std::size_t kStep = 4;
  const auto* base = row_of<float>(rows.base, 0);
  const auto* delta_row = row_of<float>(rows.deltas, 0);
  const F64x4 zero = {};
  const F64x4 one = zero + 1.0;
  const F64x4 least = zero + 1e-6;
  const F64x4 change_limit = zero + value;
  const F64x4 scale = zero + rule.scales[0];
  const F64x4 lambda = zero + rule.lambda;
  const auto choose = [](I64x4 is_first, F64x4 first, F64x4 second) {
    return (F64x4)(((I64x4)first & is_first) | ((I64x4)second & ~is_first));
  };
  for (std::size_t e = 0; e < n; e += kStep) {
    F32x4 narrow;
    load_wide(delta_row + e, narrow);
    const F64x4 delta = __builtin_convertvector(narrow, F64x4);
    const F64x4 magnitude = (F64x4)((I64x4)delta & 0x7fffffffffffffff);
    const F64x4 ratio = change_limit / choose(magnitude > least, magnitude, least);
    const F64x4 positive = choose(ratio > zero, ratio, zero);
    const F64x4 weight = choose(positive < one, positive, one);
    const I64x4 is_kept = weight > zero;
    const F64x4 total = zero + (F64x4)((I64x4)(scale * delta * weight) & is_kept);
    const F32x4 change = __builtin_convertvector(lambda * total, F32x4);
    F32x4 origin;
    load_wide(base + e, origin);
    const I32x4 is_same = change == F32x4{};
    const F32x4 sum = origin + change;
    store_wide(out + e, (I32x4)(((I32x4)origin & is_same) | ((I32x4)sum & ~is_same)));
  }
}

// Arithmetic in fp32 has no store of fp64; widening is exact.
template <class Vec>
MF_INLINE std::size_t store_merged(const typename Vec::Scalar* merged, std::size_t n, double* wide, std::byte* out,
                                   DType dtype) {
  if constexpr (sizeof(typename Vec::Scalar) == 4) {
    if (dtype == DType::kF64) {
      for (std::size_t e = 0; e < round_up(n, Vec::kLanes); ++e) wide[e] = static_cast<double>(merged[e]);
      return store_chunk<VecD>(wide, n, out, dtype);
    }
  }
  return store_chunk<Vec>(merged, n, out, dtype);
}

template <class Vec>
std::size_t elect_run(const SparseRun& run, const ElectionRule& rule, const SparseRows& rows, std::byte* out,
                      DType out_dtype) {
  using Scalar = typename Vec::Scalar;
  alignas(64) double unique[kChunkNumel];
  alignas(64) Scalar merged[kChunkNumel];
  const ElectRows sums{
      rows.sums, rows.sums + kChunkNumel, rows.sums + 2 * kChunkNumel, rows.sums + 3 * kChunkNumel, rows.integers,
      unique};
  std::size_t num_nonfinite = 0;
  const ElectChunk fast = find_elect_chunk(run, rule);
  const bool is_near = is_near_alone(run, rule);
  for (std::size_t offset = 0; offset < run.numel; offset += kChunkNumel) {
    const std::size_t n = min_size(kChunkNumel, run.numel - offset);
    load_deltas<Vec>(run.operands, run.num_models, offset, n, rows);
    if (!is_near || sizeof(Scalar) == 8) chunk_masks<Scalar>(run, offset, n, rows);
    if constexpr (sizeof(Scalar) == 4) {
      if (is_near || fast != nullptr) {
        if (is_near) {
          near_chunk(rows, run.masks[0].value, rule, n, merged);
        } else {
          fast(rows, rule, n, merged);
        }
        num_nonfinite += store_merged<Vec>(merged, n, sums.terms, out + offset * itemsize(out_dtype), out_dtype);
        continue;
      }
    }
    for (std::size_t e = 0; e < n; ++e) {
      sums.votes[e] = sums.total[e] = sums.divisor[e] = sums.unique[e] = 0;
      sums.num_counting[e] = 0;
    }
    for (std::size_t t = 0; rule.elects && t < run.num_models; ++t) {
      model_terms<Scalar>(run, rows, t, rule.votes[t], n, sums.terms);
      for (std::size_t e = 0; e < n; ++e) sums.votes[e] += sums.terms[e];
    }
    for (std::size_t t = 0; t < run.num_models; ++t) {
      model_terms<Scalar>(run, rows, t, rule.scales[t], n, sums.terms);
      add_terms(sums, rows.masks + t * kChunkNumel, rule.elects, rule.weights[t], rule.uniques[t], n);
    }
    finish_chunk<Scalar>(sums, rule, row_of<Scalar>(rows.base, 0), n, merged);
    for (std::size_t e = n; e < round_up(n, Vec::kLanes); ++e) merged[e] = 0;
    num_nonfinite += store_merged<Vec>(merged, n, sums.terms, out + offset * itemsize(out_dtype), out_dtype);
  }
  return num_nonfinite;
}

std::size_t elect_span(const SparseRun& run, const ElectionRule& rule, const SparseRows& rows, std::byte* out,
                       DType out_dtype) {
  const auto elect = any_f64(run.operands, 1 + run.num_models) ? elect_run<VecD> : elect_run<VecF>;
  return elect(run, rule, rows, out, out_dtype);
}
