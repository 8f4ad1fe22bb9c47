// Reading and writing at an offset, whole or not at all.
#pragma once

#include <cstddef>
#include <cstdint>

namespace metagpt_fast {

// Reads `nbytes` at `offset` into `buffer`, retrying short reads and EINTR.
// Returns -1 when done, 0 when the file ended early, else errno.
int read_exactly(int file, std::uint64_t offset, std::byte* buffer, std::size_t nbytes);

// Writes `nbytes` from `buffer` at `offset`, retrying short writes and EINTR. Returns -1 when done, else errno.
int write_exactly(int file, std::uint64_t offset, const std::byte* buffer, std::size_t nbytes);

}  // namespace metagpt_fast
