// layer_threshold for one instruction set; see vector_loops-inl.h for how this text is used.

// Looks for keys in [low, high]: returns how many there are, adds to `above` how many are larger. Where `found_keys` is
// not null, they are appended to it, and their positions to `found_positions`, which have room for n + kWide.
MF_NOINLINE std::size_t scan_keys(const std::uint32_t* keys, std::size_t n, std::uint32_t low, std::uint32_t high,
                                  std::uint32_t first_position, std::uint64_t& above, std::uint32_t* found_keys,
                                  std::uint32_t* found_positions) {
  // Keys are below 2^31: comparisons of signed integers, which every instruction set has.
  const I32x8 lows = I32x8{} + static_cast<std::int32_t>(low);
  const I32x8 highs = I32x8{} + static_cast<std::int32_t>(high);
  I32x8 num_above = {};
  I32x8 num_inside = {};
  std::size_t num_found = 0;
  std::size_t e = 0;
  for (; e + kWide <= n; e += kWide) {
    I32x8 key;
    load_wide(keys + e, key);
    const I32x8 is_above = key > highs;
    const I32x8 is_inside = (key >= lows) & ~is_above;
    num_above -= is_above;
    num_inside -= is_inside;
    if (found_keys == nullptr) continue;
    std::uint64_t any[4];
    __builtin_memcpy(any, &is_inside, sizeof(any));
    if ((any[0] | any[1] | any[2] | any[3]) == 0) continue;
    for (std::size_t i = 0; i < kWide; ++i) {
      found_keys[num_found] = keys[e + i];
      found_positions[num_found] = first_position + static_cast<std::uint32_t>(e + i);
      num_found += is_inside[i] & 1;
    }
  }
  std::uint64_t inside = 0;
  for (std::size_t i = 0; i < kWide; ++i) {
    above += static_cast<std::uint32_t>(num_above[i]);
    inside += static_cast<std::uint32_t>(num_inside[i]);
  }
  for (; e < n; ++e) {
    above += keys[e] > high;
    if (keys[e] < low || keys[e] > high) continue;
    ++inside;
    if (found_keys == nullptr) continue;
    found_keys[num_found] = keys[e];
    found_positions[num_found++] = first_position + static_cast<std::uint32_t>(e);
  }
  return inside;
}
