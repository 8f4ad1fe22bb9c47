// CUDA's names for the host's compiler, so that the texts of csrc/cuda/*.cuh run where there is no GPU. A thread is a
// fiber of its own; the fibers of a warp run in an order drawn anew between two barriers, and asynchronous copies
// happen as late as they may. So a barrier or a wait that is missing gives wrong results here, too.
#pragma once

#include <ucontext.h>
#include <csetjmp>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

#include "core/float_bits.h"

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define __forceinline__ inline

struct EmulatedIndex {
  unsigned x = 0;
};
inline EmulatedIndex threadIdx, blockIdx;

struct uint4 {
  std::uint32_t x, y, z, w;
};
struct uint2 {
  std::uint32_t x, y;
};
struct float4 {
  float x, y, z, w;
};
inline uint4 make_uint4(std::uint32_t x, std::uint32_t y, std::uint32_t z, std::uint32_t w) { return {x, y, z, w}; }
inline uint2 make_uint2(std::uint32_t x, std::uint32_t y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// Conversions of the processor: the same roundings by core/float_bits.h.
struct EmulatedHalf {
  std::uint16_t bits;
};
inline EmulatedHalf __ushort_as_half(std::uint16_t bits) { return {bits}; }
inline float __half2float(EmulatedHalf half) { return metagpt_fast::float_from_f16(half.bits); }
inline EmulatedHalf __float2half_rn(float value) { return {metagpt_fast::f16_from_float(value)}; }
inline std::uint16_t __half_as_ushort(EmulatedHalf half) { return half.bits; }
inline EmulatedHalf __float2bfloat16_rn(float value) { return {metagpt_fast::bf16_from_float(value)}; }
inline std::uint16_t __bfloat16_as_ushort(EmulatedHalf half) { return half.bits; }
inline float __uint_as_float(std::uint32_t bits) { return std::bit_cast<float>(bits); }
inline std::uint32_t __float_as_uint(float value) { return std::bit_cast<std::uint32_t>(value); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
template <class T>
T __ldg(const T* address) {
  return *address;
}
template <class T>
void atomicAdd(T* address, T value) {
  *address += value;
}

namespace metagpt_fast::cuda {

using Stream = void*;

namespace emulation {

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "CUDA emulation: %s (block %u, thread %u)\n", what, blockIdx.x, threadIdx.x);
  std::abort();
}

struct Copy {
  void* to;
  const void* from;
  int nbytes;
};

// One thread of the warp that runs.
struct Fiber {
  static constexpr std::size_t kStackNbytes = 64 << 10;
  ucontext_t context;  // of its beginning; from then on it is left and entered by jumps, which make no system calls
  std::jmp_buf place;
  bool is_begun = false;
  std::unique_ptr<char[]> stack = std::make_unique<char[]>(kStackNbytes);
  bool is_done = true;
  const char* barrier = nullptr;  // where it waits
  std::uint64_t published = 0;    // what it offers the others in a shuffle
  std::deque<std::vector<Copy>> groups;
  std::vector<Copy> open;
};

struct Warp {
  Fiber fibers[32];
  std::jmp_buf scheduler;
  int current = 0;
  std::function<void()> body;
  std::uint32_t random = 1;
};
inline Warp warp;

inline Fiber& self() { return warp.fibers[warp.current]; }

// Waits until all threads of the warp are at the same barrier.
inline void barrier(const char* name) {
  self().barrier = name;
  if (_setjmp(self().place) == 0) _longjmp(warp.scheduler, 1);
}

// A fiber has one thread after the other.
inline void enter() {
  for (;;) {
    warp.body();
    self().is_done = true;
    barrier("the end");
  }
}

// Lets the current fiber run until its next barrier.
[[gnu::noinline]] inline void resume() {
  if (_setjmp(warp.scheduler) != 0) return;
  Fiber& fiber = self();
  if (fiber.is_begun) _longjmp(fiber.place, 1);
  fiber.is_begun = true;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = Fiber::kStackNbytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, &enter, 0);
  setcontext(&fiber.context);
}

// Runs a warp's threads from barrier to barrier.
inline void run_warp(unsigned first_thread) {
  for (Fiber& fiber : warp.fibers) {
    fiber.is_done = false;
    fiber.groups.clear();
    fiber.open.clear();
  }
  while (!warp.fibers[0].is_done) {
    warp.random = warp.random * 1664525u + 1013904223u;
    const unsigned turn = warp.random >> 27, step = (warp.random >> 20 & 30u) + 1;  // an odd step visits all 32
    for (unsigned n = 0; n < 32; ++n) {
      warp.current = static_cast<int>((turn + n * step) % 32);
      threadIdx.x = first_thread + static_cast<unsigned>(warp.current);
      resume();
    }
    for (const Fiber& fiber : warp.fibers) {
      if (fiber.barrier != warp.fibers[0].barrier) fail("threads of a warp are at different barriers");
    }
  }
}

template <class T>
T exchange(unsigned mask, T value, unsigned from) {
  static_assert(sizeof(T) <= 8);
  if (mask != 0xffffffffu) fail("only whole warps are emulated");
  std::memcpy(&self().published, &value, sizeof(T));
  barrier("shuffle");
  std::memcpy(&value, &warp.fibers[from].published, sizeof(T));
  barrier("after the shuffle");
  return value;
}

}  // namespace emulation

template <class T>
T* in_global(std::uint64_t address) {
  return reinterpret_cast<T*>(address);
}

inline void copy_async_16(void* shared, const void* source, int nbytes) {
  if (reinterpret_cast<std::uintptr_t>(shared) % 16 != 0 || reinterpret_cast<std::uintptr_t>(source) % 16 != 0) {
    emulation::fail("an asynchronous copy is not aligned");
  }
  emulation::self().open.push_back({shared, source, nbytes});
}
inline void copy_async_commit() {
  emulation::Fiber& fiber = emulation::self();
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}
template <int kPending>
void copy_async_wait() {
  emulation::Fiber& fiber = emulation::self();
  for (; fiber.groups.size() > static_cast<std::size_t>(kPending); fiber.groups.pop_front()) {
    for (const emulation::Copy& copy : fiber.groups.front()) {
      std::memset(copy.to, 0, 16);
      std::memcpy(copy.to, copy.from, static_cast<std::size_t>(copy.nbytes));
    }
  }
}

template <class... Parameters, class... Arguments>
void launch(const char*, void (*kernel)(Parameters...), std::int64_t grid, int num_threads, Stream,
            Arguments... arguments) {
  emulation::warp.body = [=] { kernel(arguments...); };
  for (std::int64_t block = 0; block < grid; ++block) {
    blockIdx.x = static_cast<unsigned>(block);
    for (int first = 0; first < num_threads; first += 32) emulation::run_warp(static_cast<unsigned>(first));
  }
}

}  // namespace metagpt_fast::cuda

inline void __syncwarp() { metagpt_fast::cuda::emulation::barrier("__syncwarp"); }
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  namespace emulation = metagpt_fast::cuda::emulation;
  return emulation::exchange(mask, value, static_cast<unsigned>(emulation::warp.current ^ lanes));
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int delta, int width) {
  namespace emulation = metagpt_fast::cuda::emulation;
  const int lane = emulation::warp.current;
  const bool is_inside = lane % width + delta < width;
  return emulation::exchange(mask, value, static_cast<unsigned>(is_inside ? lane + delta : lane));
}
inline int __any_sync(unsigned mask, bool value) {
  namespace emulation = metagpt_fast::cuda::emulation;
  int any = emulation::exchange(mask, value ? 1 : 0, static_cast<unsigned>(emulation::warp.current));
  for (int lanes = 16; lanes > 0; lanes /= 2) any |= __shfl_xor_sync(mask, any, lanes);
  return any;
}
