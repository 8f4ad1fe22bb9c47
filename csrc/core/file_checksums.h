#pragma once

#include <cstddef>
#include <cstdint>

namespace metagpt_fast {

// crcs[i] = CRC32C of the nbytes[i] bytes at offsets[i] of an open file, read once, with pread, by num_threads()
// threads. Throws FileOperandError with the range's index as tensor, std::invalid_argument for a negative number.
void file_crc32c(int file, std::size_t num_ranges, const std::int64_t* offsets, const std::int64_t* nbytes,
                 std::uint32_t* crcs);

}  // namespace metagpt_fast
