// The CUDA kernels on the host, as a library for tests/cuda_emulation.py: device memory is the process's own.
#include "cuda_emulation.h"

#include "cuda/layer_gram.cuh"
#include "cuda/layer_merge.cuh"

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
}
