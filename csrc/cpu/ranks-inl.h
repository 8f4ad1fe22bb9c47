// DELLA's masks: the probability to be kept depends on the rank within the row (Deep et al., arXiv 2406.11617).

// order[0][r] = key and index of the element of rank r: ascending by key, then by index. Stable radix sort.
MF_NOINLINE void sort_row(const std::uint32_t* keys, std::size_t n, const RankScratch& scratch) {
  std::uint64_t* from = scratch.order[0];
  std::uint64_t* to = scratch.order[1];
  for (std::size_t e = 0; e < n; ++e) from[e] = std::uint64_t{keys[e]} << 32 | e;
  for (int shift = 32; shift < 64; shift += 8) {
    std::size_t starts[256] = {};
    for (std::size_t e = 0; e < n; ++e) ++starts[from[e] >> shift & 255];
    std::size_t total = 0;
    for (std::size_t& start : starts) {
      const std::size_t count = start;
      start = total;
      total += count;
    }
    for (std::size_t e = 0; e < n; ++e) to[starts[from[e] >> shift & 255]++] = from[e];
    std::uint64_t* swapped = from;
    from = to;
    to = swapped;
  }
}

// P(r), the probability of rank r in units of 2^-32.
MF_INLINE std::uint64_t probability_of_rank(const MaskRule& rule, std::size_t rank, std::size_t columns) {
  const auto low = static_cast<double>(rule.probabilities[0]);
  const auto high = static_cast<double>(rule.probabilities[1]);
  const auto last = static_cast<double>(columns > 1 ? columns - 1 : 1);
  return static_cast<std::uint64_t>(low + (high - low) * (static_cast<double>(rank) / last));
}

MF_INLINE std::uint32_t random_number(std::uint64_t stream, std::size_t element) {
  std::uint32_t words[4];
  random_numbers(stream, element / 4, 1, words);
  return words[element % 4];
}

void ranked_span(const Operand* operands, std::size_t num_models, std::size_t model, std::size_t loaded_first,
                 std::size_t first, std::size_t numel, const KeyRule& key, const MaskRule& mask, const SparseRows& rows,
                 const RankScratch& scratch, std::uint64_t* bits) {
  for (std::size_t word = 0; word < (numel + 63) / 64; ++word) bits[word] = 0;
  for (std::size_t begin = loaded_first; begin < first + numel; begin += key.columns) {
    keys_span(operands, num_models, model, begin - loaded_first, begin, key.columns, key, rows, scratch.keys);
    sort_row(scratch.keys, key.columns, scratch);
    for (std::size_t rank = 0; rank < key.columns; ++rank) {
      const std::size_t element = begin + (scratch.order[0][rank] & 0xffffffffu);
      if (element < first || element >= first + numel) continue;
      const bool kept = random_number(mask.stream, element) < probability_of_rank(mask, rank, key.columns);
      if (kept) bits[(element - first) / 64] |= std::uint64_t{1} << ((element - first) % 64);
    }
  }
}
