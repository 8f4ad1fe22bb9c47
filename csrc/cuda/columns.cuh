// column_gram and column_merge: every column of a matrix is a tensor of its own (docs/numerics.md), bit for bit the
// CPU's.
#pragma once

#include "layer_merge.cuh"

namespace metagpt_fast::cuda {

// Rows that are summed starting at +0, before they are added to the rest: the contract's, as in csrc/cpu.
inline constexpr int kBlockRows = 256;

// The matrices that pieces are of. Columns in device memory, one after another.
struct MatrixColumns {
  const std::int64_t* columns;     // [K] elements per row
  const std::int64_t* firsts;      // [K] the first element of a piece, counted in its tensor
  const std::int64_t* starts;      // [K] columns of the layer before the piece's tensor
  const std::int64_t* first_sums;  // [K + 1] sums before each piece: one per column and pair of operands
  const std::uint8_t* is_last;     // [K] whether the tensor ends with the piece
};

inline MatrixColumns matrix_columns_at(std::uint64_t address, std::int64_t k) {
  internal::Columns columns(address);
  MatrixColumns matrices{};
  matrices.columns = columns.take<std::int64_t>(k);
  matrices.firsts = columns.take<std::int64_t>(k);
  matrices.starts = columns.take<std::int64_t>(k);
  matrices.first_sums = columns.take<std::int64_t>(k + 1);
  matrices.is_last = columns.take<std::uint8_t>(k);
  return matrices;
}

// A thread has one column and one pair of operands, neighbours neighbouring columns. Pieces are whole rows, in order: a
// block that goes on in the next piece waits in `open_sums`, [columns, pairs]; finished ones are added to `gram`,
// [columns, V, V].
__global__ void __launch_bounds__(kSumThreads, kLeastBlocks)
    column_gram_kernel(LayerTable table, MatrixColumns matrices, std::int64_t num_sums, double* gram,
                       double* open_sums) {
  const std::int64_t number = static_cast<std::int64_t>(blockIdx.x) * kSumThreads + threadIdx.x;
  if (number >= num_sums) return;
  const std::int64_t k = tensor_of(matrices.first_sums, table.num_tensors, number);
  const int num_operands = table.num_operands;
  const std::int64_t columns = matrices.columns[k];
  const std::int64_t column = (number - matrices.first_sums[k]) % columns;
  const auto pair = static_cast<int>((number - matrices.first_sums[k]) / columns);
  int i = 0, j = pair;
  for (; j >= num_operands - i; ++i) j -= num_operands - i;
  j += i;
  double* entries = gram + (matrices.starts[k] + column) * num_operands * num_operands;
  double* open = open_sums + (matrices.starts[k] + column) * (num_operands * (num_operands + 1) / 2) + pair;
  std::int64_t row = matrices.firsts[k] / columns;
  double sum = row % kBlockRows == 0 ? 0 : *open;
  double total = entries[i * num_operands + j];
  for (std::int64_t e = column; e < table.numels[k]; e += columns) {
    double a = operand_at<double>(table, k, i, e);
    double b = operand_at<double>(table, k, j, e);
    if (table.has_base) {
      const double base = operand_at<double>(table, k, 0, e);
      if (i > 0) a -= base;
      if (j > 0) b -= base;
    }
    sum = fused(a, b, sum);
    if (++row % kBlockRows == 0) {
      total += sum;
      sum = 0;
    }
  }
  if (row % kBlockRows != 0 && matrices.is_last[k] != 0) total += sum;
  *open = sum;
  entries[i * num_operands + j] = total;
  entries[j * num_operands + i] = total;
}

template <class Scalar>
__device__ __forceinline__ unsigned merge_in_column(const LayerTable& table, const MatrixColumns& matrices,
                                                    std::int64_t k, std::int64_t e, std::int64_t column,
                                                    const double* coefficients) {
  const auto out_dtype = static_cast<DType>(table.out_dtypes[k]);
  const int num_models = table.num_operands - table.has_base;
  const Scalar sum = merged_element<Scalar>(table, k, e, coefficients + (matrices.starts[k] + column) * num_models);
  store_element(table.out_addresses[k], out_dtype, e, sum);
  return is_nonfinite(sum, overflow_threshold<Scalar>(out_dtype));
}

// coefficients: [columns, T].
__global__ void __launch_bounds__(kMergeThreads, kLeastBlocks / 2)
    column_merge_kernel(LayerTable table, MatrixColumns matrices, const double* coefficients,
                        unsigned long long* num_nonfinite) {
  const std::int64_t k = tensor_of(table.first_blocks, table.num_tensors, blockIdx.x);
  const std::int64_t first = (blockIdx.x - table.first_blocks[k]) * kBlockNumel;
  const std::int64_t numel = table.numels[k];
  const std::int64_t end = first + kBlockNumel < numel ? first + kBlockNumel : numel;
  const bool is_fp64 = table.kinds[k] == kFp64;
  const std::int64_t columns = matrices.columns[k];
  std::int64_t column = (matrices.firsts[k] + first + threadIdx.x) % columns;
  const std::int64_t step = kMergeThreads % columns;
  unsigned count = 0;
  for (std::int64_t e = first + threadIdx.x; e < end; e += kMergeThreads) {
    count += is_fp64 ? merge_in_column<double>(table, matrices, k, e, column, coefficients)
                     : merge_in_column<float>(table, matrices, k, e, column, coefficients);
    column += step;
    if (column >= columns) column -= columns;
  }
  add_count(count, num_nonfinite + table.rows[k]);
}

// Both start without waiting.
inline void column_gram(const LayerTable& table, const MatrixColumns& matrices, std::int64_t num_sums, double* gram,
                        double* open_sums, Stream stream) {
  launch("column_gram_kernel", column_gram_kernel, grid_of(num_sums), kSumThreads, stream, table, matrices, num_sums,
         gram, open_sums);
}

inline void column_merge(const LayerTable& table, const MatrixColumns& matrices, std::int64_t num_blocks,
                         const double* coefficients, unsigned long long* num_nonfinite, Stream stream) {
  launch("column_merge_kernel", column_merge_kernel, num_blocks, kMergeThreads, stream, table, matrices, coefficients,
         num_nonfinite);
}

}  // namespace metagpt_fast::cuda
