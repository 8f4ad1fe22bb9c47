#include "layer_gram.h"

#include <vector>

#include "../core/float_environment.h"
#include "../core/thread_pool.h"
#include "isa.h"
#include "spans.h"

namespace metagpt_fast::cpu {

void layer_gram(const Layer& layer, double* gram) {
  const std::size_t num_entries = layer.num_operands * layer.num_operands;
  const std::vector<Span> spans = cut_into_spans(layer);
  const KernelTable& table = kernels();
  std::vector<double> span_sums(spans.size() * num_entries, 0.0);
  const int num_workers = num_threads();
  std::vector<ThreadScratch> scratch = make_scratch(layer.num_operands, num_workers);
  const std::vector<std::size_t> groups = group_spans(spans, num_workers);
  parallel_for(groups.size() - 1, num_workers, [&](std::size_t group, int worker) {
    ThreadScratch& mine = scratch[static_cast<std::size_t>(worker)];
    mine.forget_files();
    for (std::size_t item = groups[group]; item < groups[group + 1]; ++item) {
      const Operand* operands = mine.load(layer, &spans[item], spans.data() + groups[group + 1]);
      table.gram_span(operands, layer.num_operands, layer.has_base, spans[item].numel, mine.workspace(),
                      &span_sums[item * num_entries]);
    }
  });
  const DefaultFloatEnvironment environment;  // the additions below are the caller's thread's
  for (std::size_t item = 0; item < spans.size(); ++item) {
    double* sums = gram + spans[item].tensor * num_entries;
    const double* span_sum = &span_sums[item * num_entries];
    for (std::size_t i = 0; i < layer.num_operands; ++i) {
      for (std::size_t j = i; j < layer.num_operands; ++j) {
        sums[i * layer.num_operands + j] += span_sum[i * layer.num_operands + j];
        sums[j * layer.num_operands + i] = sums[i * layer.num_operands + j];
      }
    }
  }
}

}  // namespace metagpt_fast::cpu
