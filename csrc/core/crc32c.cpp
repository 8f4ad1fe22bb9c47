#include "crc32c.h"

#include <array>
#include <cstring>

#if defined(__x86_64__)
#include <nmmintrin.h>
#elif defined(__aarch64__)
#include <sys/auxv.h>
#endif

namespace metagpt_fast {
namespace {

// Polynomials over GF(2) of degree below 32, reflected: bit 31 is the coefficient of x^0. P without its x^32.
constexpr std::uint32_t kPolynomial = 0x82f63b78;
constexpr std::uint32_t kOne = std::uint32_t{1} << 31;

// a · b mod P.
constexpr std::uint32_t multiply(std::uint32_t a, std::uint32_t b) {
  std::uint32_t product = 0;
  for (; a != 0; a <<= 1) {
    if (a & kOne) product ^= b;
    b = (b >> 1) ^ (b & 1 ? kPolynomial : 0);
  }
  return product;
}

// x^(8 · 2^k) mod P.
constexpr std::array<std::uint32_t, 64> kPowers = [] {
  std::array<std::uint32_t, 64> powers{};
  powers[0] = kOne >> 8;
  for (std::size_t k = 1; k < powers.size(); ++k) powers[k] = multiply(powers[k - 1], powers[k - 1]);
  return powers;
}();

// x^(8 nbytes) mod P: what a CRC is multiplied by when so many bytes follow.
constexpr std::uint32_t power(std::uint64_t nbytes) {
  std::uint32_t result = kOne;
  for (std::size_t k = 0; nbytes != 0; ++k, nbytes >>= 1) {
    if (nbytes & 1) result = multiply(result, kPowers[k]);
  }
  return result;
}

// Multiplication by a fixed polynomial: one table per byte of the other factor.
using Multiplier = std::array<std::array<std::uint32_t, 256>, 4>;

constexpr Multiplier make_multiplier(std::uint32_t factor) {
  Multiplier tables{};
  for (std::size_t byte = 0; byte < 4; ++byte) {
    for (std::size_t value = 1; value < 256; ++value) {
      const std::size_t rest = value & (value - 1);  // a product is the sum of those of the bits
      tables[byte][value] = rest != 0 ? tables[byte][rest] ^ tables[byte][value ^ rest]
                                      : multiply(static_cast<std::uint32_t>(value) << (8 * byte), factor);
    }
  }
  return tables;
}

constexpr std::uint32_t apply(const Multiplier& tables, std::uint32_t crc) {
  return tables[0][crc & 0xff] ^ tables[1][crc >> 8 & 0xff] ^ tables[2][crc >> 16 & 0xff] ^ tables[3][crc >> 24];
}

std::uint64_t load(const std::byte* data) {
  std::uint64_t word;
  std::memcpy(&word, data, sizeof(word));
  return word;
}

// kSlices[i][value]: what a byte of this value adds when i bytes follow it.
constexpr std::array<std::array<std::uint32_t, 256>, 8> kSlices = [] {
  std::array<std::array<std::uint32_t, 256>, 8> slices{};
  for (std::size_t i = 0; i < slices.size(); ++i) slices[i] = make_multiplier(power(i + 1))[0];
  return slices;
}();

#if defined(__x86_64__) || defined(__aarch64__)

// The instruction takes a word per cycle and has the result three cycles later: three runs of bytes are worked on at
// once. Long ones stay in the L1 cache, short ones make use of that for small tensors.
constexpr std::size_t kLongNbytes = 8192;
constexpr std::size_t kShortNbytes = 256;
constexpr Multiplier kBehindLong = make_multiplier(power(kLongNbytes));
constexpr Multiplier kBehindShort = make_multiplier(power(kShortNbytes));

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("sse4.2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("sse4.2")
#endif

[[gnu::always_inline]] static inline std::uint32_t step(std::uint32_t crc, std::uint64_t word) {
  return static_cast<std::uint32_t>(_mm_crc32_u64(crc, word));
}
[[gnu::always_inline]] static inline std::uint32_t step_byte(std::uint32_t crc, std::byte value) {
  return _mm_crc32_u8(crc, static_cast<std::uint8_t>(value));
}

#else

[[gnu::always_inline]] static inline std::uint32_t step(std::uint32_t crc, std::uint64_t word) {
  __asm__(".arch_extension crc\n\tcrc32cx %w0, %w0, %x1" : "+r"(crc) : "r"(word));
  return crc;
}
[[gnu::always_inline]] static inline std::uint32_t step_byte(std::uint32_t crc, std::byte value) {
  __asm__(".arch_extension crc\n\tcrc32cb %w0, %w0, %w1" : "+r"(crc) : "r"(static_cast<std::uint32_t>(value)));
  return crc;
}

#endif

std::uint32_t crc32c_by_instruction(const std::byte* data, std::size_t nbytes) {
  std::uint32_t crc = ~std::uint32_t{0};
  const auto take_runs = [&](std::size_t run, const Multiplier& behind) {
    for (; nbytes >= 3 * run; data += 3 * run, nbytes -= 3 * run) {
      std::uint32_t second = 0;
      std::uint32_t third = 0;
      for (std::size_t i = 0; i < run; i += 8) {
        crc = step(crc, load(data + i));
        second = step(second, load(data + run + i));
        third = step(third, load(data + 2 * run + i));
      }
      crc = apply(behind, apply(behind, crc) ^ second) ^ third;
    }
  };
  take_runs(kLongNbytes, kBehindLong);
  take_runs(kShortNbytes, kBehindShort);
  for (; nbytes >= 8; data += 8, nbytes -= 8) crc = step(crc, load(data));
  for (; nbytes > 0; ++data, --nbytes) crc = step_byte(crc, *data);
  return ~crc;
}

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

bool processor_has_crc32c() { return __builtin_cpu_supports("sse4.2"); }
#else
bool processor_has_crc32c() {
  constexpr unsigned long kCrc32 = 1ul << 7;  // HWCAP_CRC32
  return (::getauxval(AT_HWCAP) & kCrc32) != 0;
}
#endif

#endif

}  // namespace

std::uint32_t crc32c_portable(const std::byte* data, std::size_t nbytes) {
  static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__);
  std::uint32_t crc = ~std::uint32_t{0};
  for (; nbytes >= 8; data += 8, nbytes -= 8) {
    std::uint64_t word = load(data) ^ crc;
    crc = 0;
    for (std::size_t i = 8; i-- > 0; word >>= 8) crc ^= kSlices[i][word & 0xff];
  }
  for (; nbytes > 0; ++data, --nbytes) {
    crc = (crc >> 8) ^ kSlices[0][(crc ^ static_cast<std::uint32_t>(*data)) & 0xff];
  }
  return ~crc;
}

std::uint32_t crc32c(const std::byte* data, std::size_t nbytes) {
#if defined(__x86_64__) || defined(__aarch64__)
  static const bool has_instruction = processor_has_crc32c();
  if (has_instruction) return crc32c_by_instruction(data, nbytes);
#endif
  return crc32c_portable(data, nbytes);
}

void Crc32cSequence::append(std::uint32_t crc, std::uint64_t nbytes) {
  if (nbytes != nbytes_) {
    nbytes_ = nbytes;
    factor_ = power(nbytes);
  }
  value_ = multiply(value_, factor_) ^ crc;
}

}  // namespace metagpt_fast
