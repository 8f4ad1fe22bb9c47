// Random numbers that depend on nothing but stream and element: Philox4x32-10 (Salmon et al., "Parallel random numbers:
// as easy as 1, 2, 3", SC 2011).

// out[i] = the number of element 4 · counter + i, for 4 · num_counters elements; at most kChunkNumel.
MF_NOINLINE void random_numbers(std::uint64_t stream, std::uint64_t counter, std::size_t num_counters,
                                std::uint32_t* out) {
  constexpr std::size_t kMost = kChunkNumel / 4;
  alignas(64) std::uint32_t a[kMost], b[kMost], c[kMost], d[kMost];
  for (std::size_t i = 0; i < num_counters; ++i) {
    a[i] = static_cast<std::uint32_t>(counter + i);
    b[i] = static_cast<std::uint32_t>((counter + i) >> 32);
    c[i] = 0;
    d[i] = 0;
  }
  auto low = static_cast<std::uint32_t>(stream);
  auto high = static_cast<std::uint32_t>(stream >> 32);
  for (int round = 0; round < 10; ++round) {
    for (std::size_t i = 0; i < num_counters; ++i) {
      const std::uint64_t first = std::uint64_t{0xd2511f53u} * a[i];
      const std::uint64_t second = std::uint64_t{0xcd9e8d57u} * c[i];
      a[i] = static_cast<std::uint32_t>(second >> 32) ^ b[i] ^ low;
      c[i] = static_cast<std::uint32_t>(first >> 32) ^ d[i] ^ high;
      b[i] = static_cast<std::uint32_t>(second);
      d[i] = static_cast<std::uint32_t>(first);
    }
    low += 0x9e3779b9u;
    high += 0xbb67ae85u;
  }
  for (std::size_t i = 0; i < num_counters; ++i) {
    out[4 * i] = a[i];
    out[4 * i + 1] = b[i];
    out[4 * i + 2] = c[i];
    out[4 * i + 3] = d[i];
  }
}
