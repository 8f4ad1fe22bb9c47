// The launches of kernels.cu, for code that nvcc does not compile.
#pragma once

#include <cuda_runtime_api.h>

#include <string>
#include <vector>

#include "layer_table.h"

namespace metagpt_fast::cuda {

// See layer_gram.cuh and layer_merge.cuh. Neither waits; both throw std::runtime_error if a launch fails.
void run_layer_gram(const LayerTable& table, std::int64_t num_blocks, std::int64_t num_spans, unsigned kinds,
                    double* scratch, double* gram, cudaStream_t stream);
void run_layer_merge(const LayerTable& table, std::int64_t num_blocks, unsigned kinds,
                     unsigned long long* num_nonfinite, cudaStream_t stream);

}  // namespace metagpt_fast::cuda
