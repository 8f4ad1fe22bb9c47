// CRC32C (Castagnoli; RFC 3720): reflected, initial value and final XOR 0xffffffff.
#pragma once

#include <cstddef>
#include <cstdint>

namespace metagpt_fast {

// The CRC of these bytes, by the processor's own instruction where it has one (SSE4.2, Arm's CRC extension).
std::uint32_t crc32c(const std::byte* data, std::size_t nbytes);

// The same by tables, eight bytes at a time.
std::uint32_t crc32c_portable(const std::byte* data, std::size_t nbytes);

// The CRC of parts that follow one another, from those of the parts.
class Crc32cSequence {
 public:
  void append(std::uint32_t crc, std::uint64_t nbytes);
  void restart() { value_ = 0; }
  std::uint32_t value() const { return value_; }

 private:
  std::uint32_t value_ = 0;   // that of no bytes
  std::uint64_t nbytes_ = 0;  // of the last part; most have the size of the one before
  std::uint32_t factor_ = std::uint32_t{1} << 31;
};

// The CRC of a followed by b. len_b: bytes of b.
inline std::uint32_t crc32c_combine(std::uint32_t crc_a, std::uint32_t crc_b, std::uint64_t len_b) {
  Crc32cSequence sequence;
  sequence.append(crc_a, 0);
  sequence.append(crc_b, len_b);
  return sequence.value();
}

}  // namespace metagpt_fast
