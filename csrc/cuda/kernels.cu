// The one file that nvcc compiles.
#include "kernels.h"

#include "layer_gram.cuh"
#include "layer_merge.cuh"

namespace metagpt_fast::cuda {

void run_layer_gram(const LayerTable& table, std::int64_t num_blocks, std::int64_t num_spans, unsigned kinds,
                    double* scratch, double* gram, cudaStream_t stream) {
  layer_gram(table, num_blocks, num_spans, kinds, scratch, gram, stream);
}

void run_layer_merge(const LayerTable& table, std::int64_t num_blocks, unsigned kinds,
                     unsigned long long* num_nonfinite, cudaStream_t stream) {
  layer_merge(table, num_blocks, kinds, num_nonfinite, stream);
}

}  // namespace metagpt_fast::cuda
