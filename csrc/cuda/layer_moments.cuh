// layer_moments:  per model the elements kept, Σ|δ|, Σ|δ|m, Σδ², Σ(δm)², and the elements that only this model keeps,
// in fp64, bit for bit the CPU's. A thread is one of the contract's 16 lanes, half a warp a block of 4096 elements.
#pragma once

#include "masks.cuh"
#include "sums.cuh"

namespace metagpt_fast::cuda {

inline constexpr int kNumMoments = 6;

// Whether no model but t keeps element e.
template <class Scalar>
__device__ __forceinline__ bool is_alone(const LayerTable& table, const MaskColumns& masks, std::int64_t k, int t,
                                         std::int64_t e, Scalar base) {
  for (int other = 0; other < table.num_operands - 1; ++other) {
    if (other == t) continue;
    const Scalar delta = operand_at<Scalar>(table, k, 1 + other, e) - base;
    if (mask_at<Scalar>(table, masks, k, other, e, base, delta) > 0) return false;
  }
  return true;
}

template <class Scalar>
__device__ __forceinline__ void moments_of_block(const LayerTable& table, const MaskColumns& masks, std::int64_t k,
                                                 std::int64_t first, std::int64_t end, double* sums) {
  const int lane = static_cast<int>(threadIdx.x) % kNumLanes;
  for (int t = 0; t < table.num_operands - 1; ++t) {
    double kept = 0, magnitudes = 0, masked_magnitudes = 0, squares = 0, masked_squares = 0, alone = 0;
    for (std::int64_t e = first + lane; e < end; e += kNumLanes) {
      const Scalar base = operand_at<Scalar>(table, k, 0, e);
      const Scalar delta = operand_at<Scalar>(table, k, 1 + t, e) - base;
      const double mask = mask_at<Scalar>(table, masks, k, t, e, base, delta);
      const auto wide = static_cast<double>(delta);
      const double magnitude = wide < 0 ? -wide : wide;
      const double masked = mask > 0 ? magnitude * mask : 0;
      magnitudes += magnitude;
      masked_magnitudes += masked;
      squares += magnitude * magnitude;
      masked_squares += masked * masked;
      if (mask > 0) {
        kept += 1;
        alone += is_alone<Scalar>(table, masks, k, t, e, base) ? 1 : 0;
      }
    }
    const double lanes[kNumMoments] = {kept, magnitudes, masked_magnitudes, squares, masked_squares, alone};
#pragma unroll
    for (int i = 0; i < kNumMoments; ++i) {
      const double sum = lane_tree(lanes[i]);
      if (lane == 0 && first < end) sums[t * kNumMoments + i] = sum;
    }
  }
}

// block_sums[block, t, i]. Both halves of a warp take part in the trees, also one that has no block.
__global__ void __launch_bounds__(kSumThreads, kLeastBlocks)
    moments_block_kernel(LayerTable table, MaskColumns masks, std::int64_t num_blocks, double* block_sums) {
  const std::int64_t pair = static_cast<std::int64_t>(blockIdx.x) * kSumWarps + threadIdx.x / 32;
  const std::int64_t block = 2 * pair + threadIdx.x % 32 / kNumLanes;
  if (2 * pair >= num_blocks) return;
  std::int64_t k = 0, first = 0, end = 0;
  if (block < num_blocks) {
    k = tensor_of(table.first_blocks, table.num_tensors, block);
    first = (block - table.first_blocks[k]) * kBlockNumel;
    end = first + kBlockNumel < table.numels[k] ? first + kBlockNumel : table.numels[k];
  }
  double* sums = block_sums + block * (table.num_operands - 1) * kNumMoments;
  // The halves may be of different tensors; each runs through both kinds of arithmetic, empty where it is not its own.
  const bool is_fp64 = table.kinds[k] == kFp64;
  moments_of_block<double>(table, masks, k, first, is_fp64 ? end : first, sums);
  moments_of_block<float>(table, masks, k, first, is_fp64 ? first : end, sums);
}

// moments[rows[k]] += Σ of the tensor's spans, in order.
__global__ void __launch_bounds__(kSumThreads, kLeastBlocks)
    moments_tensor_kernel(LayerTable table, std::int64_t num_sums, const double* span_sums, double* moments) {
  const std::int64_t number = static_cast<std::int64_t>(blockIdx.x) * kSumThreads + threadIdx.x;
  const std::int64_t k = number / num_sums, i = number % num_sums;
  if (k >= table.num_tensors) return;
  double* place = moments + table.rows[k] * num_sums + i;
  double sum = *place;
  const std::int64_t end = table.first_spans[k + 1];
  for (std::int64_t span = table.first_spans[k]; span < end; ++span) sum += span_sums[span * num_sums + i];
  *place = sum;
}

// Adds to moments, [rows, T, 6], without waiting. `scratch` has room for (num_blocks + num_spans) · 6 T doubles.
inline void layer_moments(const LayerTable& table, const MaskColumns& masks, std::int64_t num_blocks,
                          std::int64_t num_spans, double* scratch, double* moments, Stream stream) {
  const std::int64_t num_sums = std::int64_t{table.num_operands - 1} * kNumMoments;
  double* span_sums = scratch + num_blocks * num_sums;
  const std::int64_t grid = (num_blocks + 2 * kSumWarps - 1) / (2 * kSumWarps);
  launch("moments_block_kernel", moments_block_kernel, grid, kSumThreads, stream, table, masks, num_blocks, scratch);
  launch("span_sums_kernel", span_sums_kernel, grid_of(num_spans * num_sums), kSumThreads, stream, table, num_spans,
         num_sums, static_cast<const double*>(scratch), span_sums);
  launch("moments_tensor_kernel", moments_tensor_kernel, grid_of(table.num_tensors * num_sums), kSumThreads, stream,
         table, num_sums, static_cast<const double*>(span_sums), moments);
}

}  // namespace metagpt_fast::cuda
