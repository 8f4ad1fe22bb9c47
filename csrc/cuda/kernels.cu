// The one file that nvcc compiles.
#include "kernels.h"

#include "columns.cuh"
#include "layer_elect.cuh"
#include "layer_gram.cuh"
#include "layer_merge.cuh"
#include "layer_moments.cuh"
#include "layer_threshold.cuh"
#include "ranked_masks.cuh"

namespace metagpt_fast::cuda {

void run_layer_gram(const LayerTable& table, std::int64_t num_blocks, std::int64_t num_spans, unsigned kinds,
                    double* scratch, double* gram, cudaStream_t stream) {
  layer_gram(table, num_blocks, num_spans, kinds, scratch, gram, stream);
}

void run_layer_merge(const LayerTable& table, std::int64_t num_blocks, unsigned kinds,
                     unsigned long long* num_nonfinite, cudaStream_t stream) {
  layer_merge(table, num_blocks, kinds, num_nonfinite, stream);
}

void run_count_keys(const LayerTable& table, std::int64_t num_blocks, int count, const WantedKeys& wanted,
                    unsigned long long* counts, cudaStream_t stream) {
  count_keys(table, num_blocks, static_cast<Count>(count), wanted, counts, stream);
}

void run_layer_moments(const LayerTable& table, const MaskColumns& masks, std::int64_t num_blocks,
                       std::int64_t num_spans, double* scratch, double* moments, cudaStream_t stream) {
  layer_moments(table, masks, num_blocks, num_spans, scratch, moments, stream);
}

void run_layer_elect(const LayerTable& table, const MaskColumns& masks, const ElectionColumns& election,
                     std::int64_t num_blocks, unsigned long long* num_nonfinite, cudaStream_t stream) {
  layer_elect(table, masks, election, num_blocks, num_nonfinite, stream);
}

void run_ranked_masks(const LayerTable& table, const MaskColumns& masks, const RankColumns& ranks,
                      std::int64_t num_blocks, std::int64_t num_rows, std::int64_t num_items, void* scratch,
                      cudaStream_t stream) {
  ranked_masks(table, masks, ranks, num_blocks, num_rows, num_items, scratch, stream);
}

void run_column_gram(const LayerTable& table, std::uint64_t matrices, std::int64_t num_sums, double* gram,
                     double* open_sums, cudaStream_t stream) {
  column_gram(table, matrix_columns_at(matrices, table.num_tensors), num_sums, gram, open_sums, stream);
}

void run_column_merge(const LayerTable& table, std::uint64_t matrices, std::int64_t num_blocks,
                      const double* coefficients, unsigned long long* num_nonfinite, cudaStream_t stream) {
  column_merge(table, matrix_columns_at(matrices, table.num_tensors), num_blocks, coefficients, num_nonfinite, stream);
}

}  // namespace metagpt_fast::cuda
