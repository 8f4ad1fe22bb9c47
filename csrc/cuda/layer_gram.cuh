// layer_gram:  gram[k,i,j] += Σ_e v_i[e] v_j[e],   v = [base, τ_1 ... τ_T]  (docs/numerics.md), bit for bit the CPU's.
// Blocks of 4096 elements, 16 fp32 lanes each, a tree in fp64; blocks outside fp32's range again in fp64; then blocks
// in order within a span, and spans in order. A thread is one virtual lane, half a warp is a block.
#pragma once

#include "sums.cuh"

namespace metagpt_fast::cuda {

inline constexpr int kGramWarps = kSumWarps;
inline constexpr int kGramThreads = kSumThreads;

__host__ __device__ constexpr int num_pairs(int num_operands) { return num_operands * (num_operands + 1) / 2; }

// The place of the pair (i, j), i <= j, among all of them.
__device__ inline int pair_of(int i, int j, int num_operands) { return i * num_operands - i * (i - 1) / 2 + j - i; }

template <DType kDType>
__device__ inline float load_shared(const unsigned char* operand, int e) {
  if constexpr (kDType == DType::kF32) {
    return reinterpret_cast<const float*>(operand)[e];
  } else {
    return widen<kDType>(reinterpret_cast<const std::uint16_t*>(operand)[e]);
  }
}

// Tensors of one dtype. A block's operands come in stages of 256 bytes each, by asynchronous copies of 16 bytes that
// run kStages - 1 stages ahead; every thread then picks its lane's elements. No thread waits for another warp.
template <DType kDType, int kOperands>
__global__ void __launch_bounds__(kGramThreads, 4)
    gram_uniform_kernel(LayerTable table, std::int64_t num_blocks, double* block_sums) {
  constexpr int kStages = kOperands <= 5 ? 4 : 2;
  constexpr int kStageNbytes = 256;
  constexpr int kStageNumel = kStageNbytes / kItemsize<kDType>;
  [[maybe_unused]] constexpr int kUnrolled = kOperands <= 5 ? kStageNumel / kNumLanes : 2;
  // The two blocks of a warp are read together: 64 bytes keep them in different banks.
  constexpr int kHalfNbytes = kOperands * kStageNbytes + 64;
  constexpr int kPairs = num_pairs(kOperands);
  __shared__ __align__(16) unsigned char shared[kGramWarps][kStages][2][kHalfNbytes];

  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int half = static_cast<int>(threadIdx.x) % 32 / kNumLanes;
  const int lane = static_cast<int>(threadIdx.x) % kNumLanes;
  const std::int64_t block = (static_cast<std::int64_t>(blockIdx.x) * kGramWarps + warp) * 2 + half;

  int nbytes = 0;  // of the block, per operand, from this thread's first byte on
  const unsigned char* source[kOperands];
#pragma unroll
  for (int i = 0; i < kOperands; ++i) source[i] = reinterpret_cast<const unsigned char*>(table.addresses);
  if (block < num_blocks) {
    const std::int64_t k = tensor_of(table.first_blocks, table.num_tensors, block);
    if (table.kinds[k] == kUniform + static_cast<int>(kDType)) {
      const std::int64_t first = (block - table.first_blocks[k]) * kBlockNumel;
      const std::int64_t rest = table.numels[k] - first;
      nbytes = static_cast<int>(rest < kBlockNumel ? rest : kBlockNumel) * kItemsize<kDType>;
#pragma unroll
      for (int i = 0; i < kOperands; ++i) {
        source[i] =
            reinterpret_cast<const unsigned char*>(table.addresses[k * kOperands + i]) + first * kItemsize<kDType>;
      }
    }
  }
  const int other_nbytes = __shfl_xor_sync(kAllThreads, nbytes, kNumLanes);
  const int num_stages = ((nbytes > other_nbytes ? nbytes : other_nbytes) + kStageNbytes - 1) / kStageNbytes;

  const auto copy_stage = [&](int stage) {
    const int offset = stage * kStageNbytes + lane * 16;
    const int rest = nbytes - offset;
    const int valid = rest < 0 ? 0 : rest < 16 ? rest : 16;  // behind the block's end: zeros, which add nothing
#pragma unroll
    for (int i = 0; i < kOperands; ++i) {
      copy_async_16(&shared[warp][stage % kStages][half][i * kStageNbytes + lane * 16],
                    source[i] + (valid > 0 ? offset : 0), valid);
    }
  };

  float sums[kPairs];
#pragma unroll
  for (int pair = 0; pair < kPairs; ++pair) sums[pair] = 0.0f;
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) {
    if (stage < num_stages) copy_stage(stage);
    copy_async_commit();
  }
  for (int stage = 0; stage < num_stages; ++stage) {
    copy_async_wait<kStages - 2>();
    __syncwarp();  // the stage has come, and nobody reads the one before it any more
    if (stage + kStages - 1 < num_stages) copy_stage(stage + kStages - 1);
    copy_async_commit();
    const unsigned char* operands = shared[warp][stage % kStages][half];
#pragma unroll kUnrolled
    for (int e = 0; e < kStageNumel; e += kNumLanes) {
      float v[kOperands];
#pragma unroll
      for (int i = 0; i < kOperands; ++i) v[i] = load_shared<kDType>(operands + i * kStageNbytes, e + lane);
      const float subtrahend = table.has_base ? v[0] : 0.0f;  // x − 0 is x, for −0 too
#pragma unroll
      for (int i = 1; i < kOperands; ++i) v[i] -= subtrahend;
      int pair = 0;
#pragma unroll
      for (int i = 0; i < kOperands; ++i) {
#pragma unroll
        for (int j = i; j < kOperands; ++j, ++pair) sums[pair] = __fmaf_rn(v[i], v[j], sums[pair]);
      }
    }
  }
  if (num_stages == 0) return;  // the same for all of the warp
#pragma unroll
  for (int pair = 0; pair < kPairs; ++pair) {
    const double sum = lane_tree(static_cast<double>(sums[pair]));
    if (lane == 0 && nbytes > 0) block_sums[block * kPairs + pair] = sum;
  }
}

// One block by one warp, for any operands: half a warp per tile of 4 x 4 pairs, operands read from global memory.
template <class Scalar>
__device__ void gram_block(const LayerTable& table, std::int64_t k, std::int64_t first, int numel, double* sums) {
  constexpr int kTile = 4;
  const int half = static_cast<int>(threadIdx.x) % 32 / kNumLanes;
  const int lane = static_cast<int>(threadIdx.x) % kNumLanes;
  const int num_operands = table.num_operands;
  const std::uint64_t* addresses = table.addresses + k * num_operands;
  const std::uint8_t* dtypes = table.dtypes + k * num_operands;
  const auto load = [&](int i, std::int64_t e) {
    return load_element<Scalar>(__ldg(addresses + i), static_cast<DType>(__ldg(dtypes + i)), e);
  };
  const int num_rows = (num_operands + kTile - 1) / kTile;
  int row = 0, column = half;
  for (int done = 0; done < num_rows * (num_rows + 1) / 2; done += 2, column += 2) {
    while (row < num_rows && column >= num_rows) {  // tiles in the order (0,0) (0,1) ... (1,1) ...
      ++row;
      column += row - num_rows;
    }
    const int i0 = row * kTile, j0 = column * kTile;
    const bool is_tile = row < num_rows;
    Scalar tile[kTile][kTile] = {};
    for (int e = lane; is_tile && e < numel; e += kNumLanes) {
      const Scalar base = table.has_base ? load(0, first + e) : Scalar(0);
      const auto value = [&](int i) {
        if (i >= num_operands) return Scalar(0);
        return table.has_base && i == 0 ? base : load(i, first + e) - base;
      };
      Scalar rows[kTile], columns[kTile];
#pragma unroll
      for (int n = 0; n < kTile; ++n) {
        rows[n] = value(i0 + n);
        columns[n] = value(j0 + n);
      }
#pragma unroll
      for (int r = 0; r < kTile; ++r) {
#pragma unroll
        for (int c = 0; c < kTile; ++c) tile[r][c] = fused(rows[r], columns[c], tile[r][c]);
      }
    }
#pragma unroll
    for (int r = 0; r < kTile; ++r) {
#pragma unroll
      for (int c = 0; c < kTile; ++c) {
        const double sum = lane_tree(static_cast<double>(tile[r][c]));
        const int i = i0 + r, j = j0 + c;
        if (lane == 0 && is_tile && i <= j && j < num_operands) sums[pair_of(i, j, num_operands)] = sum;
      }
    }
  }
}

// Where a warp's block is; numel 0 if it has none.
struct BlockPlace {
  std::int64_t block, k, first;
  int numel;
};

__device__ inline BlockPlace block_of_warp(const LayerTable& table, std::int64_t num_blocks) {
  BlockPlace place{static_cast<std::int64_t>(blockIdx.x) * kGramWarps + threadIdx.x / 32, 0, 0, 0};
  if (place.block >= num_blocks) return place;
  place.k = tensor_of(table.first_blocks, table.num_tensors, place.block);
  place.first = (place.block - table.first_blocks[place.k]) * kBlockNumel;
  const std::int64_t rest = table.numels[place.k] - place.first;
  place.numel = static_cast<int>(rest < kBlockNumel ? rest : kBlockNumel);
  return place;
}

// Tensors of several dtypes, or with a number of operands that gram_uniform_kernel is not compiled for.
__global__ void __launch_bounds__(kGramThreads, 4)
    gram_general_kernel(LayerTable table, std::int64_t num_blocks, double* block_sums) {
  const BlockPlace place = block_of_warp(table, num_blocks);
  if (place.numel == 0 || table.kinds[place.k] != kGeneral) return;
  gram_block<float>(table, place.k, place.first, place.numel, block_sums + place.block * num_pairs(table.num_operands));
}

// Whether v_i is zero throughout the block, so that a sum of squares of exactly 0 is no underflow.
__device__ inline bool is_zero(const LayerTable& table, const BlockPlace& place, int i) {
  const std::uint64_t* addresses = table.addresses + place.k * table.num_operands;
  const std::uint8_t* dtypes = table.dtypes + place.k * table.num_operands;
  bool differs = false;
  for (int e = static_cast<int>(threadIdx.x) % 32; e < place.numel; e += 32) {
    float value = load_element<float>(addresses[i], static_cast<DType>(dtypes[i]), place.first + e);
    if (table.has_base && i > 0) {
      value -= load_element<float>(addresses[0], static_cast<DType>(dtypes[0]), place.first + e);
    }
    differs |= value != 0.0f;
  }
  return __any_sync(kAllThreads, differs) == 0;
}

// Computes blocks again in fp64 whose squares left fp32's range, and those of tensors with an F64 operand.
__global__ void __launch_bounds__(kGramThreads)
    gram_fp64_kernel(LayerTable table, std::int64_t num_blocks, double* block_sums) {
  constexpr double kLeastReliableSum = 0x1p-80;
  constexpr double kGreatestReliableSum = 0x1p+100;
  const BlockPlace place = block_of_warp(table, num_blocks);
  if (place.numel == 0) return;
  double* sums = block_sums + place.block * num_pairs(table.num_operands);
  bool is_reliable = table.kinds[place.k] != kFp64;
  for (int i = 0; is_reliable && i < table.num_operands; ++i) {
    const double sum = sums[pair_of(i, i, table.num_operands)];
    is_reliable = sum <= kGreatestReliableSum &&  // not NaN either
                  (sum >= kLeastReliableSum || (sum == 0 && is_zero(table, place, i)));
  }
  if (!is_reliable) gram_block<double>(table, place.k, place.first, place.numel, sums);
}

// gram[rows[k]] += Σ of the tensor's spans, in order.
__global__ void __launch_bounds__(kGramThreads)
    gram_tensor_kernel(LayerTable table, const double* span_sums, double* gram) {
  const int pairs = num_pairs(table.num_operands);
  const std::int64_t number = static_cast<std::int64_t>(blockIdx.x) * kGramThreads + threadIdx.x;
  const std::int64_t k = number / pairs;
  int j = static_cast<int>(number % pairs);
  if (k >= table.num_tensors) return;
  int i = 0;
  for (; j >= table.num_operands - i; ++i) j -= table.num_operands - i;
  j += i;
  double* sums = gram + table.rows[k] * table.num_operands * table.num_operands;
  double sum = sums[i * table.num_operands + j];
  const std::int64_t end = table.first_spans[k + 1];
#pragma unroll 8
  for (std::int64_t span = table.first_spans[k]; span < end; ++span) sum += span_sums[span * pairs + number % pairs];
  sums[i * table.num_operands + j] = sum;
  sums[j * table.num_operands + i] = sum;
}

template <DType kDType>
bool launch_gram_uniform(const LayerTable& table, std::int64_t num_blocks, double* block_sums, Stream stream) {
  const std::int64_t grid = (num_blocks + 2 * kGramWarps - 1) / (2 * kGramWarps);
  const auto run = [&](void (*kernel)(LayerTable, std::int64_t, double*)) {
    launch("gram_uniform_kernel", kernel, grid, kGramThreads, stream, table, num_blocks, block_sums);
    return true;
  };
  switch (table.num_operands) {
    case 2:
      return run(gram_uniform_kernel<kDType, 2>);
    case 3:
      return run(gram_uniform_kernel<kDType, 3>);
    case 4:
      return run(gram_uniform_kernel<kDType, 4>);
    case 5:
      return run(gram_uniform_kernel<kDType, 5>);
    case 9:
      return run(gram_uniform_kernel<kDType, 9>);
    default:
      return false;
  }
}

// Adds the Gram matrices of a layer to gram, [rows, V, V], without waiting. `kinds`: bit b is set if a tensor is of
// kind b. `scratch` has room for (num_blocks + num_spans) · V(V + 1)/2 doubles.
inline void layer_gram(const LayerTable& table, std::int64_t num_blocks, std::int64_t num_spans, unsigned kinds,
                       double* scratch, double* gram, Stream stream) {
  const std::int64_t pairs = num_pairs(table.num_operands);
  double* span_sums = scratch + num_blocks * pairs;
  const auto has = [kinds](int kind) { return (kinds >> kind & 1u) != 0; };
  const auto uniform = [](DType dtype) { return kUniform + static_cast<int>(dtype); };
  bool done = true;
  if (has(uniform(DType::kF32))) done &= launch_gram_uniform<DType::kF32>(table, num_blocks, scratch, stream);
  if (has(uniform(DType::kF16))) done &= launch_gram_uniform<DType::kF16>(table, num_blocks, scratch, stream);
  if (has(uniform(DType::kBF16))) done &= launch_gram_uniform<DType::kBF16>(table, num_blocks, scratch, stream);
  if (!done) throw std::invalid_argument("kinds: no uniform kernel for this number of operands");
  const std::int64_t grid = (num_blocks + kGramWarps - 1) / kGramWarps;
  if (has(kGeneral)) {
    launch("gram_general_kernel", gram_general_kernel, grid, kGramThreads, stream, table, num_blocks, scratch);
  }
  launch("gram_fp64_kernel", gram_fp64_kernel, grid, kGramThreads, stream, table, num_blocks, scratch);
  launch("span_sums_kernel", span_sums_kernel, grid_of(num_spans * pairs), kSumThreads, stream, table, num_spans, pairs,
         static_cast<const double*>(scratch), span_sums);
  launch("gram_tensor_kernel", gram_tensor_kernel, grid_of(table.num_tensors * pairs), kSumThreads, stream, table,
         static_cast<const double*>(span_sums), gram);
}

}  // namespace metagpt_fast::cuda
