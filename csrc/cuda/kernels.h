// The launches of kernels.cu, for code that nvcc does not compile.
#pragma once

#include <cuda_runtime_api.h>

#include <string>
#include <vector>

#include "layer_table.h"
#include "sparse_table.h"

namespace metagpt_fast::cuda {

// See layer_gram.cuh, layer_merge.cuh, and those of the sparse kernels. None waits; all throw std::runtime_error if a
// launch fails.
void run_layer_gram(const LayerTable& table, std::int64_t num_blocks, std::int64_t num_spans, unsigned kinds,
                    double* scratch, double* gram, cudaStream_t stream);
void run_layer_merge(const LayerTable& table, std::int64_t num_blocks, unsigned kinds,
                     unsigned long long* num_nonfinite, cudaStream_t stream);
void run_count_keys(const LayerTable& table, std::int64_t num_blocks, int count, const WantedKeys& wanted,
                    unsigned long long* counts, cudaStream_t stream);
void run_layer_moments(const LayerTable& table, const MaskColumns& masks, std::int64_t num_blocks,
                       std::int64_t num_spans, double* scratch, double* moments, cudaStream_t stream);
void run_layer_elect(const LayerTable& table, const MaskColumns& masks, const ElectionColumns& election,
                     std::int64_t num_blocks, unsigned long long* num_nonfinite, cudaStream_t stream);
void run_ranked_masks(const LayerTable& table, const MaskColumns& masks, const RankColumns& ranks,
                      std::int64_t num_blocks, std::int64_t num_rows, std::int64_t num_items, void* scratch,
                      cudaStream_t stream);
void run_column_gram(const LayerTable& table, std::uint64_t matrices, std::int64_t num_sums, double* gram,
                     double* open_sums, cudaStream_t stream);
void run_column_merge(const LayerTable& table, std::uint64_t matrices, std::int64_t num_blocks,
                      const double* coefficients, unsigned long long* num_nonfinite, cudaStream_t stream);

}  // namespace metagpt_fast::cuda
