// Masks of one chunk: a word of ones for every element that is kept; see vector_loops-inl.h for how this text is used.

MF_INLINE std::uint32_t all_ones_if(bool kept) { return kept ? ~0u : 0u; }

// Elements [first, first + n) of the tensor have these keys; padded to a multiple of kWide with anything.
MF_NOINLINE void band_mask(const std::uint32_t* keys, std::size_t first, std::size_t n, const MaskRule& rule,
                           std::uint32_t* mask) {
  // Keys are at most kNanKey: ends above 2^31 are above all of them, and signed comparisons do. Ends' indices count
  // from the first element of the chunk.
  const auto key_end = [](std::uint32_t key) {
    return static_cast<std::int32_t>(key < 0x7fffffffu ? key : 0x7fffffffu);
  };
  const auto index_end = [first, n](std::int64_t index) {
    const std::int64_t relative = index - static_cast<std::int64_t>(first);
    const auto last = static_cast<std::int64_t>(n);
    return static_cast<std::int32_t>(relative < -1 ? -1 : relative > last ? last : relative);
  };
  const I32x8 upper = I32x8{} + key_end(rule.keys[0]);
  const I32x8 lower = I32x8{} + key_end(rule.keys[1]);
  const I32x8 upper_index = I32x8{} + index_end(rule.indices[0]);
  const I32x8 lower_index = I32x8{} + index_end(rule.indices[1]);
  I32x8 index = {0, 1, 2, 3, 4, 5, 6, 7};
  for (std::size_t e = 0; e < n; e += kWide) {
    I32x8 key;
    load_wide(keys + e, key);
    const I32x8 is_below = (key < upper) | ((key == upper) & (index >= upper_index));
    const I32x8 is_above = (key > lower) | ((key == lower) & (index <= lower_index));
    store_wide(mask + e, is_below & is_above);
    index += static_cast<std::int32_t>(kWide);
  }
}

// `first` is a multiple of 4.
MF_NOINLINE void random_mask(std::size_t first, std::size_t n, const MaskRule& rule, std::uint32_t* mask) {
  const std::uint64_t probability = rule.probabilities[0];
  if (probability >> 32 != 0) {
    for (std::size_t e = 0; e < n; ++e) mask[e] = ~0u;
    return;
  }
  const auto limit = static_cast<std::uint32_t>(probability);
  random_numbers(rule.stream, first / 4, (n + 3) / 4, mask);
  for (std::size_t e = 0; e < n; ++e) mask[e] = all_ones_if(mask[e] < limit);
}

// weights[e] = min(max(value / max(|δ|, 1e-6), 0), 1), where a NaN counts as small.
template <class Scalar>
void near_mask(const Scalar* delta, std::size_t n, double value, double* weights, std::uint32_t* mask) {
  for (std::size_t e = 0; e < n; ++e) {
    const double magnitude = __builtin_fabs(static_cast<double>(delta[e]));
    const double ratio = value / (magnitude > 1e-6 ? magnitude : 1e-6);
    const double positive = ratio > 0 ? ratio : 0;
    weights[e] = positive < 1 ? positive : 1;
    mask[e] = all_ones_if(weights[e] > 0);
  }
}

// A word of ones for every bit of n that is set.
template <class Vec>
MF_NOINLINE void expand_bits(const std::uint64_t* bits, std::size_t n, std::uint32_t* mask) {
  for (std::size_t e = 0; e < n; e += Vec::kLanes) {
    const std::uint64_t few = bits[e / 64] >> (e % 64);
    Vec::expand(static_cast<std::uint32_t>(Vec::kLanes == 1 ? few & 1 : few), mask + e);
  }
}

// The other way round; the bits after the last are 0.
template <class Vec>
MF_NOINLINE void pack_bits(const std::uint32_t* mask, std::size_t n, std::uint64_t* bits) {
  for (std::size_t begin = 0; begin < n; begin += 64) {
    std::uint64_t word = 0;
    for (std::size_t i = 0; i < min_size(n - begin, 64); i += Vec::kLanes) {
      word |= std::uint64_t{Vec::equal(mask + begin + i, ~0u)} << i;
    }
    bits[begin / 64] = word;
  }
}

MF_INLINE bool is_same_band(const MaskRule& a, const MaskRule& b) {
  return b.kind == MaskKind::kBand && a.keys[0] == b.keys[0] && a.keys[1] == b.keys[1] &&
         a.indices[0] == b.indices[0] && a.indices[1] == b.indices[1];
}

// rows.masks of elements [offset, offset + n) of the run, whose deltas are loaded; zero up to a multiple of kNumLanes.
template <class Scalar>
void chunk_masks(const SparseRun& run, std::size_t offset, std::size_t n, const SparseRows& rows) {
  const std::size_t first = run.first + offset;
  bool has_keys = false;  // of the variance, which all models share
  for (std::size_t t = 0; t < run.num_models; ++t) {
    const MaskRule& rule = run.masks[t];
    std::uint32_t* mask = rows.masks + t * kChunkNumel;
    switch (rule.kind) {
      case MaskKind::kAll:
        for (std::size_t e = 0; e < n; ++e) mask[e] = ~0u;
        break;
      case MaskKind::kBand:
        if (has_keys && is_same_band(rule, run.masks[t - 1])) {
          __builtin_memcpy(mask, mask - kChunkNumel, n * sizeof(*mask));
          break;
        }
        if (!has_keys) chunk_keys<Scalar>(rows, run.num_models, t, first, n, run.key, rows.keys);
        has_keys = run.key.kind == KeyKind::kVariance;
        band_mask(rows.keys, first, n, rule, mask);
        break;
      case MaskKind::kRandom:
        random_mask(first, n, rule, mask);
        break;
      case MaskKind::kNear:
        near_mask<Scalar>(row_of<Scalar>(rows.deltas, t), n, rule.value, rows.weights + t * kChunkNumel, mask);
        break;
      case MaskKind::kBits:
        expand_bits<VecF>(rule.bits + offset / 64, n, mask);
        break;
      case MaskKind::kRanked:  // has become kBits
        break;
    }
    for (std::size_t e = n; e < round_up(n, kNumLanes); ++e) mask[e] = 0;
    if (rule.bits != nullptr && rule.kind != MaskKind::kBits) pack_bits<VecF>(mask, n, rule.bits + offset / 64);
  }
}
