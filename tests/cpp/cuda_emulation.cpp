// The CUDA kernels on the host, as a library for tests/cuda_emulation.py: device memory is the process's own.
#include "cuda_emulation.h"

#include "cuda/columns.cuh"
#include "cuda/layer_elect.cuh"
#include "cuda/layer_gram.cuh"
#include "cuda/layer_merge.cuh"
#include "cuda/layer_moments.cuh"
#include "cuda/layer_threshold.cuh"
#include "cuda/ranked_masks.cuh"

using namespace metagpt_fast::cuda;

extern "C" {

void emulated_layer_gram(std::uint64_t table, std::int64_t num_tensors, int num_operands, int has_base,
                         std::int64_t num_blocks, std::int64_t num_spans, unsigned kinds, double* scratch,
                         double* gram) {
  layer_gram(layer_table_at(table, num_tensors, num_operands, has_base != 0), num_blocks, num_spans, kinds, scratch,
             gram, nullptr);
}

void emulated_layer_merge(std::uint64_t table, std::int64_t num_tensors, int num_operands, int has_base,
                          std::int64_t num_blocks, unsigned kinds, unsigned long long* num_nonfinite) {
  layer_merge(layer_table_at(table, num_tensors, num_operands, has_base != 0), num_blocks, kinds, num_nonfinite,
              nullptr);
}
void emulated_count_keys(std::uint64_t table, std::int64_t num_tensors, int num_operands, std::int64_t num_blocks,
                         int count, std::uint64_t wanted, int key_kind, int num_keys, int num_ranks,
                         unsigned long long* counts) {
  count_keys(layer_table_at(table, num_tensors, num_operands, true), num_blocks, static_cast<Count>(count),
             wanted_keys_at(wanted, num_tensors, key_kind, num_keys, num_ranks), counts, nullptr);
}

void emulated_layer_moments(std::uint64_t table, std::int64_t num_tensors, int num_operands, std::int64_t num_blocks,
                            std::int64_t num_spans, std::uint64_t masks, int key_kind, double* scratch,
                            double* moments) {
  layer_moments(layer_table_at(table, num_tensors, num_operands, true),
                mask_columns_at(masks, num_tensors, num_operands - 1, key_kind), num_blocks, num_spans, scratch,
                moments, nullptr);
}

void emulated_layer_elect(std::uint64_t table, std::int64_t num_tensors, int num_operands, std::int64_t num_blocks,
                          std::uint64_t masks, int key_kind, std::uint64_t election,
                          unsigned long long* num_nonfinite) {
  layer_elect(layer_table_at(table, num_tensors, num_operands, true),
              mask_columns_at(masks, num_tensors, num_operands - 1, key_kind),
              election_columns_at(election, num_tensors, num_operands - 1), num_blocks, num_nonfinite, nullptr);
}

void emulated_ranked_masks(std::uint64_t table, std::int64_t num_tensors, int num_operands, std::int64_t num_blocks,
                           std::uint64_t masks, int key_kind, std::uint64_t ranks, std::int64_t num_rows,
                           std::int64_t num_items, void* scratch) {
  ranked_masks(layer_table_at(table, num_tensors, num_operands, true),
               mask_columns_at(masks, num_tensors, num_operands - 1, key_kind), rank_columns_at(ranks, num_tensors),
               num_blocks, num_rows, num_items, scratch, nullptr);
}
void emulated_column_gram(std::uint64_t table, std::int64_t num_tensors, int num_operands, int has_base,
                          std::uint64_t matrices, std::int64_t num_sums, double* gram, double* open_sums) {
  column_gram(layer_table_at(table, num_tensors, num_operands, has_base != 0), matrix_columns_at(matrices, num_tensors),
              num_sums, gram, open_sums, nullptr);
}

void emulated_column_merge(std::uint64_t table, std::int64_t num_tensors, int num_operands, int has_base,
                           std::uint64_t matrices, std::int64_t num_blocks, const double* coefficients,
                           unsigned long long* num_nonfinite) {
  column_merge(layer_table_at(table, num_tensors, num_operands, has_base != 0),
               matrix_columns_at(matrices, num_tensors), num_blocks, coefficients, num_nonfinite, nullptr);
}
}
