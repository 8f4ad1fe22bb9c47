// layer_threshold in counts of integers, which pieces of a tensor add to in any order: of the keys' upper 16 bits, of
// the lower 15 among those that share them, and of the equal keys in every span. The host finds the ranks in the counts
// (metagpt_fast/backends/streamed_threshold.py). Also how many keys are above 0.
#pragma once

#include "masks.cuh"
#include "sums.cuh"

namespace metagpt_fast::cuda {

enum class Count : int { kUpperBits = 0, kLowerBits = 1, kEqual = 2, kNonzero = 3 };
inline constexpr int kLowerKeyBits = 15;
inline constexpr int kUpperBins = 1 << 16;
inline constexpr int kLowerBins = 1 << kLowerKeyBits;

// Adds to counters in device memory; neighbours that are equal, as many zeros are, cost one addition.
class Counter {
 public:
  __device__ void add(unsigned long long* place) {
    if (place != place_) {
      flush();
      place_ = place;
    }
    ++count_;
  }
  __device__ void flush() {
    if (count_ != 0) atomicAdd(place_, count_);
    count_ = 0;
  }

 private:
  unsigned long long* place_ = nullptr;
  unsigned long long count_ = 0;
};

// A warp counts the keys j of a block. Wanted: of every rank the bits of its key found so far, ~0 for none.
template <class Scalar, Count kCount>
__device__ __forceinline__ void count_keys(const LayerTable& table, const WantedKeys& wanted, std::int64_t k,
                                           std::int64_t first, std::int64_t end, int j, unsigned long long* counts) {
  const std::uint32_t* found = wanted.bits + (k * wanted.num_keys + j) * wanted.num_ranks;
  for (int r = 0; r < wanted.num_ranks; ++r) {
    const std::uint32_t bits = __ldg(found + r);
    Counter counter;
    unsigned greater = 0, equal = 0;
    for (std::int64_t e = first + threadIdx.x % 32; e < end; e += 32) {
      const std::uint32_t key = key_at<Scalar>(table, wanted.ranked_by, k, j, e);
      if constexpr (kCount == Count::kUpperBits) {
        counter.add(counts + (key >> kLowerKeyBits));
      } else if constexpr (kCount == Count::kLowerBits) {
        if (key >> kLowerKeyBits == bits) {
          counter.add(counts + static_cast<std::int64_t>(r) * kLowerBins + (key & (kLowerBins - 1)));
        }
      } else {
        greater += key > bits ? 1 : 0;
        equal += key == bits ? 1 : 0;
      }
    }
    counter.flush();
    if constexpr (kCount == Count::kEqual || kCount == Count::kNonzero) {
      add_count(greater, counts + 2 * r);
      if constexpr (kCount == Count::kEqual) add_count(equal, counts + 2 * r + 1);
    }
  }
}

// counts: kUpperBits [rows, J, 2^16], kLowerBits [rows, J, R, 2^15], kEqual [rows, J, R, 2] above the key and equal to
// it, where a row is a span, the piece's first at rows[k]; kNonzero [rows, J, 2] of which the first is counted.
template <Count kCount>
__global__ void __launch_bounds__(kSumThreads, kLeastBlocks)
    count_keys_kernel(LayerTable table, std::int64_t num_blocks, WantedKeys wanted, unsigned long long* counts) {
  const std::int64_t block = static_cast<std::int64_t>(blockIdx.x) * kSumWarps + threadIdx.x / 32;
  if (block >= num_blocks) return;
  const std::int64_t k = tensor_of(table.first_blocks, table.num_tensors, block);
  const std::int64_t number = block - table.first_blocks[k];
  const std::int64_t first = number * kBlockNumel;
  const std::int64_t end = first + kBlockNumel < table.numels[k] ? first + kBlockNumel : table.numels[k];
  const std::int64_t row = table.rows[k] + (kCount == Count::kEqual ? number / kSpanBlocks : 0);
  for (int j = 0; j < wanted.num_keys; ++j) {
    const std::int64_t stride = kCount == Count::kUpperBits   ? kUpperBins
                                : kCount == Count::kLowerBits ? std::int64_t{wanted.num_ranks} * kLowerBins
                                                              : std::int64_t{wanted.num_ranks} * 2;
    unsigned long long* own = counts + (row * wanted.num_keys + j) * stride;
    if (table.kinds[k] == kFp64) {
      count_keys<double, kCount>(table, wanted, k, first, end, j, own);
    } else {
      count_keys<float, kCount>(table, wanted, k, first, end, j, own);
    }
  }
}

// Adds to the counts without waiting. One rank is wanted where its bits are not asked for, and 0 to be above of
// kNonzero.
inline void count_keys(const LayerTable& table, std::int64_t num_blocks, Count count, const WantedKeys& wanted,
                       unsigned long long* counts, Stream stream) {
  const auto run = [&](void (*kernel)(LayerTable, std::int64_t, WantedKeys, unsigned long long*)) {
    launch("count_keys_kernel", kernel, (num_blocks + kSumWarps - 1) / kSumWarps, kSumThreads, stream, table,
           num_blocks, wanted, counts);
  };
  switch (count) {
    case Count::kUpperBits:
      return run(count_keys_kernel<Count::kUpperBits>);
    case Count::kLowerBits:
      return run(count_keys_kernel<Count::kLowerBits>);
    case Count::kEqual:
      return run(count_keys_kernel<Count::kEqual>);
    case Count::kNonzero:
      return run(count_keys_kernel<Count::kNonzero>);
  }
}

}  // namespace metagpt_fast::cuda
