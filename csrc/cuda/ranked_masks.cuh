// DELLA's masks as bits: the probability to be kept depends on the rank within the row (Deep et al., arXiv 2406.11617).
// A warp sorts a row, by a bitonic network in device memory: ranks are exact whatever the keys are, and a row may have
// any length that scratch memory has room for.
#pragma once

#include "masks.cuh"
#include "sums.cuh"

namespace metagpt_fast::cuda {

// The probability of a rank, in ascending order, in units of 2^-32; 2^32 itself becomes 2^32 − 1.
__device__ __forceinline__ std::uint32_t probability_of_rank(const MaskColumns& masks, std::int64_t rule,
                                                             std::int64_t rank, std::int64_t columns) {
  const auto low = static_cast<double>(__ldg(masks.probabilities + 2 * rule));
  const auto high = static_cast<double>(__ldg(masks.probabilities + 2 * rule + 1));
  const auto last = static_cast<double>(columns > 1 ? columns - 1 : 1);
  const auto probability = static_cast<std::uint64_t>(low + (high - low) * (static_cast<double>(rank) / last));
  return probability < 0xffffffffu ? static_cast<std::uint32_t>(probability) : ~0u;
}

// Sorts `count` items, a power of two, in ascending order; all threads of a warp together.
__device__ __forceinline__ void sort_items(std::uint64_t* items, std::int64_t count) {
  __syncwarp();
  for (std::int64_t size = 2; size <= count; size *= 2) {
    for (std::int64_t stride = size / 2; stride > 0; stride /= 2) {
      for (std::int64_t pair = threadIdx.x % 32; pair < count / 2; pair += 32) {
        const std::int64_t i = 2 * pair - (pair & (stride - 1));
        const std::uint64_t a = items[i], b = items[i + stride];
        if ((a > b) == ((i & size) == 0)) {
          items[i] = b;
          items[i + stride] = a;
        }
      }
      __syncwarp();
    }
  }
}

// kept[starts[k] + e] = 1 where model t keeps element e of a piece. Items are keys and the elements' places in the row.
__global__ void __launch_bounds__(kSumThreads, kLeastBlocks)
    ranked_rows_kernel(LayerTable table, MaskColumns masks, RankColumns ranks, int t, std::uint64_t* items,
                       std::uint8_t* kept) {
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * kSumWarps + threadIdx.x / 32;
  if (row >= ranks.first_rows[table.num_tensors]) return;
  const std::int64_t k = tensor_of(ranks.first_rows, table.num_tensors, row);
  const std::int64_t rule = k * (table.num_operands - 1) + t;
  if (static_cast<MaskKind>(masks.kinds[rule]) != MaskKind::kRanked) return;
  const std::int64_t columns = masks.ranked_by.columns[k];
  std::int64_t padded = 1;
  while (padded < columns) padded *= 2;
  const std::int64_t number = row - ranks.first_rows[k];
  const std::int64_t first = number * columns;
  std::uint64_t* own = items + ranks.starts[k] + number * padded;
  const bool is_fp64 = table.kinds[k] == kFp64;
  for (std::int64_t i = threadIdx.x % 32; i < padded; i += 32) {
    std::uint64_t key = 0xffffffffu;  // behind all others
    if (i < columns) {
      key = is_fp64 ? key_at<double>(table, masks.ranked_by, k, t, first + i)
                    : key_at<float>(table, masks.ranked_by, k, t, first + i);
    }
    own[i] = key << 32 | static_cast<std::uint64_t>(i);
  }
  sort_items(own, padded);
  for (std::int64_t rank = threadIdx.x % 32; rank < columns; rank += 32) {
    const auto e = first + static_cast<std::int64_t>(own[rank] & 0xffffffffu);
    const std::uint32_t number_of_e =
        random_number(masks.streams[rule], static_cast<std::uint64_t>(masks.ranked_by.firsts[k] + e));
    kept[ranks.starts[k] + e] = number_of_e < probability_of_rank(masks, rule, rank, columns) ? 1 : 0;
  }
}

// Eight elements to a byte, at masks.bits.
__global__ void __launch_bounds__(kSumThreads, kLeastBlocks)
    pack_bits_kernel(LayerTable table, MaskColumns masks, RankColumns ranks, int t, const std::uint8_t* kept) {
  const std::int64_t k = tensor_of(table.first_blocks, table.num_tensors, blockIdx.x);
  const std::int64_t rule = k * (table.num_operands - 1) + t;
  if (static_cast<MaskKind>(masks.kinds[rule]) != MaskKind::kRanked) return;
  const std::int64_t first = (blockIdx.x - table.first_blocks[k]) * kBlockNumel;
  const std::int64_t numel = table.numels[k];
  const std::int64_t end = first + kBlockNumel < numel ? first + kBlockNumel : numel;
  for (std::int64_t e = first + 8 * std::int64_t{threadIdx.x}; e < end; e += 8 * kSumThreads) {
    unsigned byte = 0;
    for (int bit = 0; bit < 8 && e + bit < end; ++bit) {
      byte |= static_cast<unsigned>(kept[ranks.starts[k] + e + bit]) << bit;
    }
    in_global<std::uint8_t>(masks.bits[rule])[e / 8] = static_cast<std::uint8_t>(byte);
  }
}

// Writes the bits of all masks of kind kRanked without waiting. `scratch` has room for num_items uint64 and as many
// bytes: rows padded to powers of two.
inline void ranked_masks(const LayerTable& table, const MaskColumns& masks, const RankColumns& ranks,
                         std::int64_t num_blocks, std::int64_t num_rows, std::int64_t num_items, void* scratch,
                         Stream stream) {
  auto* items = static_cast<std::uint64_t*>(scratch);
  auto* kept = reinterpret_cast<std::uint8_t*>(items + num_items);
  for (int t = 0; t < table.num_operands - 1; ++t) {
    launch("ranked_rows_kernel", ranked_rows_kernel, (num_rows + kSumWarps - 1) / kSumWarps, kSumThreads, stream, table,
           masks, ranks, t, items, kept);
    launch("pack_bits_kernel", pack_bits_kernel, num_blocks, kSumThreads, stream, table, masks, ranks, t,
           static_cast<const std::uint8_t*>(kept));
  }
}

}  // namespace metagpt_fast::cuda
