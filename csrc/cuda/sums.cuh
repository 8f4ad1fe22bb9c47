// How sums are added up: 16 lanes of a block by a tree in fp64, the blocks of a span in order (docs/numerics.md).
#pragma once

#include "elements.cuh"

namespace metagpt_fast::cuda {

inline constexpr unsigned kAllThreads = 0xffffffffu;
inline constexpr int kSumWarps = 4;
inline constexpr int kSumThreads = 32 * kSumWarps;
// Blocks of a multiprocessor that a kernel's registers have to allow. Without a number ptxas wants more of them than
// these kernels' registers do, and spills.
inline constexpr int kLeastBlocks = 4;

// The sum over a block's lanes, as a fixed tree, for lane 0.
__device__ inline double lane_tree(double sum) {
#pragma unroll
  for (int width = kNumLanes / 2; width > 0; width /= 2) sum += __shfl_down_sync(kAllThreads, sum, width, kNumLanes);
  return sum;
}

// Adds up a warp's counts. Sums of integers do not depend on the order; most warps have nothing to add.
__device__ inline void add_count(unsigned count, unsigned long long* total) {
  if (__any_sync(kAllThreads, count != 0) == 0) return;
#pragma unroll
  for (int width = 16; width > 0; width /= 2) count += __shfl_down_sync(kAllThreads, count, width, 32);
  if (threadIdx.x % 32 == 0) atomicAdd(total, static_cast<unsigned long long>(count));
}

// span_sums[s, i] = Σ of the span's blocks, in order, for each of num_sums sums.
__global__ void __launch_bounds__(kSumThreads, kLeastBlocks)
    span_sums_kernel(LayerTable table, std::int64_t num_spans, std::int64_t num_sums, const double* block_sums,
                     double* span_sums) {
  const std::int64_t number = static_cast<std::int64_t>(blockIdx.x) * kSumThreads + threadIdx.x;
  const std::int64_t span = number / num_sums, i = number % num_sums;
  if (span >= num_spans) return;
  const std::int64_t k = tensor_of(table.first_spans, table.num_tensors, span);
  const std::int64_t first = table.first_blocks[k] + (span - table.first_spans[k]) * kSpanBlocks;
  const std::int64_t rest = table.first_blocks[k + 1] - first;
  const double* block_sum = block_sums + first * num_sums + i;
  double sum = 0;
#pragma unroll 8
  for (int block = 0; block < static_cast<int>(rest < kSpanBlocks ? rest : kSpanBlocks); ++block) {
    sum += block_sum[static_cast<std::int64_t>(block) * num_sums];
  }
  span_sums[span * num_sums + i] = sum;
}

// Threads that have something to do each, as a grid of kSumThreads.
inline std::int64_t grid_of(std::int64_t num_threads) { return (num_threads + kSumThreads - 1) / kSumThreads; }

}  // namespace metagpt_fast::cuda
