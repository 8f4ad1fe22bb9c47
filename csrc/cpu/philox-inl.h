// Random numbers that depend on nothing but stream and element: Philox4x32-10 (Salmon et al., "Parallel random numbers:
// as easy as 1, 2, 3", SC 2011).

MF_INLINE void plain_random_numbers(std::uint64_t stream, std::uint64_t counter, std::size_t num_counters,
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

// The numbers of the 16 counters from `counter` on, where Vec multiplies the low halves of four 64-bit lanes, each of
// which has a word of one counter: GCC 12 finds neither this multiplication for the plain loop nor registers for its
// state.
template <class Vec>
MF_INLINE void random_block(std::uint64_t stream, std::uint64_t counter, std::uint32_t* out) {
  using Lanes64 [[gnu::vector_size(32)]] = std::uint64_t;
  constexpr int kNumRegisters = 4;
  constexpr std::uint64_t kLow = 0xffffffffu;
  const Lanes64 first_factor = Lanes64{} + 0xd2511f53u;
  const Lanes64 second_factor = Lanes64{} + 0xcd9e8d57u;
  Lanes64 a[kNumRegisters], b[kNumRegisters], c[kNumRegisters], d[kNumRegisters];
#pragma GCC unroll 4
  for (int r = 0; r < kNumRegisters; ++r) {
    const Lanes64 number = Lanes64{0, 1, 2, 3} + (counter + 4 * static_cast<std::uint64_t>(r));
    a[r] = number;
    b[r] = number >> 32;
    c[r] = Lanes64{};
    d[r] = Lanes64{};
  }
  std::uint64_t low = stream & kLow;
  std::uint64_t high = stream >> 32;
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
#pragma GCC unroll 4
    for (int r = 0; r < kNumRegisters; ++r) {
      const Lanes64 first = Vec::multiply_low_halves(a[r], first_factor);
      const Lanes64 second = Vec::multiply_low_halves(c[r], second_factor);
      a[r] = (second >> 32) ^ b[r] ^ low;
      c[r] = (first >> 32) ^ d[r] ^ high;
      b[r] = second;
      d[r] = first;
    }
    low = (low + 0x9e3779b9u) & kLow;
    high = (high + 0xbb67ae85u) & kLow;
  }
#pragma GCC unroll 4
  for (int r = 0; r < kNumRegisters; ++r) {
    const Lanes64 front = (a[r] & kLow) | b[r] << 32;
    const Lanes64 back = (c[r] & kLow) | d[r] << 32;
    Vec::store_interleaved(front, back, out + 16 * r);
  }
}

template <class Vec>
MF_INLINE void wide_random_numbers(std::uint64_t stream, std::uint64_t counter, std::size_t num_counters,
                                   std::uint32_t* out) {
  constexpr std::size_t kBlock = 16;
  std::size_t done = 0;
  for (; done + kBlock <= num_counters; done += kBlock) random_block<Vec>(stream, counter + done, out + 4 * done);
  if (done == num_counters) return;
  std::uint32_t block[4 * kBlock];
  random_block<Vec>(stream, counter + done, block);
  __builtin_memcpy(out + 4 * done, block, 4 * (num_counters - done) * sizeof(std::uint32_t));
}

template <class Vec>
MF_INLINE void random_numbers_by(std::uint64_t stream, std::uint64_t counter, std::size_t num_counters,
                                 std::uint32_t* out) {
  if constexpr (Vec::kLanes >= 8) {
    wide_random_numbers<Vec>(stream, counter, num_counters, out);
  } else {
    plain_random_numbers(stream, counter, num_counters, out);
  }
}

// out[i] = the number of element 4 · counter + i, for 4 · num_counters elements; at most kChunkNumel.
MF_NOINLINE void random_numbers(std::uint64_t stream, std::uint64_t counter, std::size_t num_counters,
                                std::uint32_t* out) {
  random_numbers_by<VecF>(stream, counter, num_counters, out);
}
