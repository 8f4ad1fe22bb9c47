// What the kernels need of CUDA beyond the language: asynchronous copies to shared memory, and a checked launch.
// tests/cpp/cuda_emulation.h has the same names.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace metagpt_fast::cuda {

using Stream = cudaStream_t;

// A pointer to global memory, said to the compiler, which loads through a mere number in a slower, generic way. The two
// kinds of addresses are the same numbers.
template <class T>
__device__ inline T* in_global(std::uint64_t address) {
  return static_cast<T*>(__cvta_global_to_generic(address));
}

// Copies `nbytes` (0 to 16) of the 16 at `source` to shared memory, and zeros behind them. Both are multiples of 16.
__device__ inline void copy_async_16(void* shared, const void* source, int nbytes) {
  const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(source), "r"(nbytes) : "memory");
}
// Closes a group of copies of this thread.
__device__ inline void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for all of this thread's groups but the last kPending.
template <int kPending>
__device__ inline void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Throws std::runtime_error with the kernel's name and grid if the launch fails; the kernel itself runs later.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), std::int64_t grid, int num_threads, Stream stream,
            Arguments... arguments) {
  if (grid == 0) return;
  if (grid > 0x7fffffff) throw std::runtime_error(std::string(name) + ": a grid of " + std::to_string(grid));
  kernel<<<static_cast<unsigned>(grid), static_cast<unsigned>(num_threads), 0, stream>>>(arguments...);
  const cudaError_t status = cudaGetLastError();
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string(name) + "<<<" + std::to_string(grid) + ", " + std::to_string(num_threads) +
                             ">>>: " + cudaGetErrorString(status));
  }
}

}  // namespace metagpt_fast::cuda
