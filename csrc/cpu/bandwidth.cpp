#include "bandwidth.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "../core/thread_pool.h"

namespace metagpt_fast::cpu {
namespace {

constexpr std::size_t kItemNbytes = std::size_t{2} << 20;

}  // namespace

std::uint64_t bandwidth_read(const std::byte* data, std::size_t nbytes) {
  std::atomic<std::uint64_t> total{0};
  parallel_for((nbytes + kItemNbytes - 1) / kItemNbytes, num_threads(), [&](std::size_t item, int) {
    const std::byte* first = data + item * kItemNbytes;
    const std::size_t size = std::min(kItemNbytes, nbytes - item * kItemNbytes);
    std::uint64_t sums[16] = {};
    std::size_t i = 0;
    for (; i + sizeof(sums) <= size; i += sizeof(sums)) {
      std::uint64_t words[16];
      std::memcpy(words, first + i, sizeof(words));
      for (int w = 0; w < 16; ++w) sums[w] += words[w];
    }
    std::uint64_t sum = 0;
    for (const std::uint64_t part : sums) sum += part;
    for (; i < size; ++i) sum += static_cast<std::uint64_t>(first[i]);
    total.fetch_add(sum, std::memory_order_relaxed);
  });
  return total.load();
}

void bandwidth_triad(float* a, const float* b, const float* c, std::size_t numel) {
  constexpr std::size_t kItemNumel = kItemNbytes / (3 * sizeof(float));
  parallel_for((numel + kItemNumel - 1) / kItemNumel, num_threads(), [&](std::size_t item, int) {
    const std::size_t last = std::min(numel, (item + 1) * kItemNumel);
    for (std::size_t i = item * kItemNumel; i < last; ++i) a[i] = b[i] + 3.0f * c[i];
  });
}

}  // namespace metagpt_fast::cpu
