#include "file_io.h"

#include <unistd.h>

#include <cerrno>

namespace metagpt_fast {

int read_exactly(int file, std::uint64_t offset, std::byte* buffer, std::size_t nbytes) {
  while (nbytes > 0) {
    const ssize_t done = ::pread(file, buffer, nbytes, static_cast<off_t>(offset));
    if (done < 0) {
      if (errno == EINTR) continue;
      return errno;
    }
    if (done == 0) return 0;
    buffer += done;
    offset += static_cast<std::uint64_t>(done);
    nbytes -= static_cast<std::size_t>(done);
  }
  return -1;
}

int write_exactly(int file, std::uint64_t offset, const std::byte* buffer, std::size_t nbytes) {
  while (nbytes > 0) {
    const ssize_t done = ::pwrite(file, buffer, nbytes, static_cast<off_t>(offset));
    if (done < 0) {
      if (errno == EINTR) continue;
      return errno;
    }
    if (done == 0) return ENOSPC;  // POSIX leaves a zero count for a non-zero request unexplained
    buffer += done;
    offset += static_cast<std::uint64_t>(done);
    nbytes -= static_cast<std::size_t>(done);
  }
  return -1;
}

}  // namespace metagpt_fast
