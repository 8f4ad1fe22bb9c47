#include "file_checksums.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "crc32c.h"
#include "file_io.h"
#include "layer.h"
#include "thread_pool.h"

namespace metagpt_fast {
namespace {

// What a thread reads at a time: stays in its L2 cache until it is summed.
constexpr std::int64_t kChunkNbytes = std::int64_t{256} << 10;

struct Chunk {
  std::size_t range;
  std::uint64_t offset;
  std::size_t nbytes;
};

}  // namespace

void file_crc32c(int file, std::size_t num_ranges, const std::int64_t* offsets, const std::int64_t* nbytes,
                 std::uint32_t* crcs) {
  std::vector<Chunk> chunks;
  for (std::size_t i = 0; i < num_ranges; ++i) {
    if (offsets[i] < 0 || nbytes[i] < 0) throw std::invalid_argument("ranges: got a negative number");
    for (std::int64_t first = 0; first < nbytes[i]; first += kChunkNbytes) {
      chunks.push_back({i, static_cast<std::uint64_t>(offsets[i] + first),
                        static_cast<std::size_t>(std::min(kChunkNbytes, nbytes[i] - first))});
    }
  }
  std::vector<std::uint32_t> chunk_crcs(chunks.size());
  const int num_workers = num_threads();
  std::vector<std::unique_ptr<std::byte[]>> buffers(static_cast<std::size_t>(num_workers));
  parallel_for(chunks.size(), num_workers, [&](std::size_t item, int worker) {
    std::unique_ptr<std::byte[]>& buffer = buffers[static_cast<std::size_t>(worker)];
    if (buffer == nullptr) buffer = std::make_unique_for_overwrite<std::byte[]>(kChunkNbytes);
    const Chunk& chunk = chunks[item];
    const int status = read_exactly(file, chunk.offset, buffer.get(), chunk.nbytes);
    if (status >= 0) {
      throw FileOperandError(status == 0 ? "the file ended early" : std::strerror(status), status, chunk.range, 0);
    }
    chunk_crcs[item] = crc32c(buffer.get(), chunk.nbytes);
  });
  std::vector<Crc32cSequence> sequences(num_ranges);
  for (std::size_t item = 0; item < chunks.size(); ++item) {
    sequences[chunks[item].range].append(chunk_crcs[item], chunks[item].nbytes);
  }
  for (std::size_t i = 0; i < num_ranges; ++i) crcs[i] = sequences[i].value();
}

}  // namespace metagpt_fast
