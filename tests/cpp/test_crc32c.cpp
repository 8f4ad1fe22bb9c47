// CRC32C: known answers, instruction and tables against each other and against division bit by bit, joined parts.
#include "core/crc32c.h"

#include <cstring>
#include <string_view>
#include <vector>

#include "check.h"

namespace metagpt_fast::test {
namespace {

std::uint32_t bit_by_bit(const std::byte* data, std::size_t nbytes) {
  std::uint32_t crc = 0xffffffff;
  for (std::size_t i = 0; i < nbytes; ++i) {
    crc ^= static_cast<std::uint32_t>(data[i]);
    for (int bit = 0; bit < 8; ++bit) crc = crc & 1 ? crc >> 1 ^ 0x82f63b78 : crc >> 1;
  }
  return ~crc;
}

void check_all(Checks& checks, const std::byte* data, std::size_t nbytes, std::uint32_t expected, const char* what) {
  for (const auto& [name, function] : {std::pair{"crc32c", &crc32c}, std::pair{"crc32c_portable", &crc32c_portable}}) {
    const std::uint32_t got = function(data, nbytes);
    checks.check(got == expected, [&, name = name] {
      return describe(name, " of ", what, ", ", nbytes, " bytes: ", std::hex, got, ", expected ", expected);
    });
  }
}

}  // namespace

void test_crc32c(Checks& checks) {
  const std::string_view digits = "123456789";
  check_all(checks, reinterpret_cast<const std::byte*>(digits.data()), digits.size(), 0xe3069283, "digits");
  std::vector<std::byte> block(32, std::byte{0});
  check_all(checks, block.data(), block.size(), 0x8a9136aa, "zeros");
  std::memset(block.data(), 0xff, block.size());
  check_all(checks, block.data(), block.size(), 0x62a8ab43, "ones");

  Random random(17);
  std::vector<std::byte> data(100'000);
  for (std::byte& each : data) each = static_cast<std::byte>(random.below(256));
  // Around words and around three runs of each length.
  for (const std::size_t size :
       {0u, 1u, 7u, 8u, 9u, 255u, 767u, 768u, 769u, 1535u, 1543u, 24575u, 24576u, 24577u, 49152u, 49927u, 99'990u}) {
    for (const std::size_t offset : {0u, 1u, 7u}) {
      check_all(checks, data.data() + offset, size, bit_by_bit(data.data() + offset, size), "random bytes");
    }
  }

  for (int round = 0; round < 50; ++round) {
    const std::size_t size = random.below(data.size());
    Crc32cSequence sequence;
    for (std::size_t first = 0; first < size;) {
      const std::size_t part = std::min<std::size_t>(size - first, random.below(4) == 0 ? 4096 : random.below(20'000));
      sequence.append(crc32c(data.data() + first, part), part);
      first += part;
    }
    checks.check(sequence.value() == crc32c(data.data(), size), "parts joined");
    const std::size_t cut = random.below(size + 1);
    checks.check(crc32c_combine(crc32c(data.data(), cut), crc32c(data.data() + cut, size - cut), size - cut) ==
                     crc32c(data.data(), size),
                 "two parts combined");
  }
}

}  // namespace metagpt_fast::test
