// layer_elect:  out = base + λ · Σ (scale δ) m / Σ weight  over the models that count at an element, bit for bit the
// CPU's: fp64, every operation rounded, in the order of the models; the change and the sum in the deltas' format.
#pragma once

#include "layer_merge.cuh"
#include "masks.cuh"

namespace metagpt_fast::cuda {

// (factor · δ) · m, 0 where the element is dropped.
__device__ __forceinline__ double masked_term(double factor, double delta, double mask) {
  return mask > 0 ? factor * delta * mask : 0;
}

template <class Scalar>
__device__ __forceinline__ unsigned elect_element(const LayerTable& table, const MaskColumns& masks,
                                                  const ElectionColumns& election, std::int64_t k, std::int64_t e) {
  const int num_models = table.num_operands - 1;
  const std::int64_t row = k * num_models;
  const bool elects = __ldg(election.elects + k) != 0;
  const Scalar base = operand_at<Scalar>(table, k, 0, e);
  double votes = 0;
  for (int t = 0; elects && t < num_models; ++t) {
    const Scalar delta = operand_at<Scalar>(table, k, 1 + t, e) - base;
    const double mask = mask_at<Scalar>(table, masks, k, t, e, base, delta);
    votes += masked_term(__ldg(election.votes + row + t), static_cast<double>(delta), mask);
  }
  double total = 0, divisor = 0, unique = 0;
  int num_counting = 0;
  for (int t = 0; t < num_models; ++t) {
    const Scalar delta = operand_at<Scalar>(table, k, 1 + t, e) - base;
    const double mask = mask_at<Scalar>(table, masks, k, t, e, base, delta);
    const double term = masked_term(__ldg(election.scales + row + t), static_cast<double>(delta), mask);
    // A NaN counts: it is neither below nor above zero.
    const bool agrees = votes >= 0 ? !(term <= 0) : !(term >= 0);
    if (elects ? agrees : mask > 0) {
      total += term;
      divisor += __ldg(election.weights + row + t);
      unique = __ldg(election.uniques + row + t);
      ++num_counting;
    }
  }
  if (num_counting == 1) total *= unique;
  if (__ldg(election.normalizes + k) == 0 || divisor == 0) divisor = 1;
  const double floor = __ldg(election.floors + k);
  if (floor > 0 && divisor < floor) divisor = floor;
  const auto change = static_cast<Scalar>(__ldg(election.lambdas + k) * (total / divisor));
  const Scalar merged = change == 0 ? base : base + change;
  const auto out_dtype = static_cast<DType>(table.out_dtypes[k]);
  store_element(table.out_addresses[k], out_dtype, e, merged);
  return is_nonfinite(merged, overflow_threshold<Scalar>(out_dtype));
}

__global__ void __launch_bounds__(kMergeThreads, kLeastBlocks / 2)
    elect_kernel(LayerTable table, MaskColumns masks, ElectionColumns election, unsigned long long* num_nonfinite) {
  const std::int64_t k = tensor_of(table.first_blocks, table.num_tensors, blockIdx.x);
  const std::int64_t first = (blockIdx.x - table.first_blocks[k]) * kBlockNumel;
  const std::int64_t numel = table.numels[k];
  const std::int64_t end = first + kBlockNumel < numel ? first + kBlockNumel : numel;
  const bool is_fp64 = table.kinds[k] == kFp64;
  unsigned count = 0;
  for (std::int64_t e = first + threadIdx.x; e < end; e += kMergeThreads) {
    count += is_fp64 ? elect_element<double>(table, masks, election, k, e)
                     : elect_element<float>(table, masks, election, k, e);
  }
  add_count(count, num_nonfinite + table.rows[k]);
}

// Writes the merged tensors without waiting, and adds how many elements are NaN or Inf to num_nonfinite, [rows].
inline void layer_elect(const LayerTable& table, const MaskColumns& masks, const ElectionColumns& election,
                        std::int64_t num_blocks, unsigned long long* num_nonfinite, Stream stream) {
  launch("elect_kernel", elect_kernel, num_blocks, kMergeThreads, stream, table, masks, election, num_nonfinite);
}

}  // namespace metagpt_fast::cuda
