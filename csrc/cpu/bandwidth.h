// The machine's limits, measured with the threads that the kernels use: what a perfect kernel would reach.
#pragma once

#include <cstddef>
#include <cstdint>

namespace metagpt_fast::cpu {

// Reads `nbytes` bytes at `data` once, from first to last. Returns a value that depends on all of them.
std::uint64_t bandwidth_read(const std::byte* data, std::size_t nbytes);

// a[i] = b[i] + s·c[i] over `numel` floats: reads 8 and writes 4 bytes per element (STREAM triad).
void bandwidth_triad(float* a, const float* b, const float* c, std::size_t numel);

}  // namespace metagpt_fast::cpu
