// layer_threshold for one instruction set; see vector_loops-inl.h for how this text is used.

MF_INLINE void count_key(std::uint32_t key, std::uint32_t low, std::uint32_t high, KeyCounts& counts,
                         std::uint32_t* found) {
  counts.above += key > high;
  counts.at_high += key == high;
  counts.at_low += key == low && low != high;
  if (key <= low || key >= high) return;
  if (found != nullptr) found[0] = key;
  ++counts.between;
}

template <class Vec>
MF_INLINE std::size_t popcount(std::uint32_t bits) {
  if constexpr (Vec::kLanes == 1) return bits;
  return static_cast<std::size_t>(__builtin_popcount(bits));
}

MF_NOINLINE std::size_t scan_keys(const std::uint32_t* keys, std::size_t n, std::uint32_t low, std::uint32_t high,
                                  KeyCounts& counts, std::uint32_t* found) {
  using Vec = VecF;
  KeyCounts sums;
  std::size_t num_found = 0;
  std::size_t e = 0;
  for (; e + Vec::kLanes <= n; e += Vec::kLanes) {
    const std::uint32_t above = Vec::greater(keys + e, high);
    const std::uint32_t at_high = Vec::equal(keys + e, high);
    const std::uint32_t above_low = Vec::greater(keys + e, low);
    const std::uint32_t at_low = Vec::equal(keys + e, low);
    const std::uint32_t between = above_low & ~(above | at_high);
    sums.above += popcount<Vec>(above);
    sums.at_high += popcount<Vec>(at_high);
    sums.at_low += popcount<Vec>(at_low);
    if (found != nullptr) {
      num_found += Vec::pack(keys + e, between, found + num_found);
    } else {
      sums.between += popcount<Vec>(between);
    }
  }
  sums.between += num_found;
  if (low == high) sums.at_low = 0;
  for (; e < n; ++e) {
    const std::uint64_t before = sums.between;
    count_key(keys[e], low, high, sums, found == nullptr ? nullptr : found + num_found);
    num_found += found == nullptr ? 0 : sums.between - before;
  }
  counts.above += sums.above;
  counts.at_high += sums.at_high;
  counts.between += sums.between;
  counts.at_low += sums.at_low;
  return num_found;
}
