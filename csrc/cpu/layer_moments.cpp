#include "layer_moments.h"

#include <algorithm>
#include <vector>

#include "../core/float_environment.h"
#include "../core/thread_pool.h"
#include "isa.h"
#include "sparse_spans.h"

namespace metagpt_fast::cpu {

void layer_moments(const Layer& layer, const MaskTable& masks, double* moments) {
  const std::vector<Span> spans = cut_into_spans(layer);
  check_masks(layer, masks);
  const KernelTable& table = kernels();
  const std::size_t num_entries = layer.num_models() * kNumMoments;
  std::vector<double> span_sums(spans.size() * num_entries);
  const int num_workers = num_threads();
  std::vector<SparseScratch> scratch = make_sparse_scratch(layer.num_operands, num_workers);
  parallel_for(spans.size(), num_workers, [&](std::size_t item, int worker) {
    SparseScratch& mine = scratch[static_cast<std::size_t>(worker)];
    table.sparse.moments(mine.load_run(layer, masks, spans[item], false), mine.rows(), &span_sums[item * num_entries]);
  });
  const DefaultFloatEnvironment environment;  // the additions below are the caller's thread's
  std::fill_n(moments, layer.num_tensors * num_entries, 0.0);
  for (std::size_t item = 0; item < spans.size(); ++item) {
    for (std::size_t i = 0; i < num_entries; ++i) {
      moments[spans[item].tensor * num_entries + i] += span_sums[item * num_entries + i];
    }
  }
}

}  // namespace metagpt_fast::cpu
