// What layer_merge and column_merge share: groups of spans go through a kernel.
#pragma once

#include <vector>

#include "../core/thread_pool.h"
#include "span_outputs.h"
#include "spans.h"

namespace metagpt_fast::cpu {

// Calls kernel(operands, span, workspace, destination, out_dtype) -> number of NaN and Inf written, for every span, and
// sets num_nonfinite[k], and out.crcs[k] if they are wanted, to what the spans of tensor k add up to.
template <class Kernel>
void merge_spans(const Layer& layer, const std::vector<Span>& spans, const LayerOutput& out,
                 std::int64_t* num_nonfinite, Kernel kernel) {
  SpanOutputs outputs(layer, spans, out);
  const int num_workers = num_threads();
  std::vector<ThreadScratch> scratch = make_scratch(layer.num_operands, num_workers);
  const std::vector<std::size_t> groups = group_spans(spans, num_workers);
  parallel_for(groups.size() - 1, num_workers, [&](std::size_t group, int worker) {
    ThreadScratch& mine = scratch[static_cast<std::size_t>(worker)];
    mine.forget_files();
    const Span* group_end = spans.data() + groups[group + 1];
    outputs.run(groups[group], groups[group + 1], mine, [&](std::size_t item, std::byte* destination, DType out_dtype) {
      const Operand* operands = mine.load(layer, &spans[item], group_end);
      return kernel(operands, spans[item], mine.workspace(), destination, out_dtype);
    });
  });
  outputs.finish(num_nonfinite);
}

}  // namespace metagpt_fast::cpu
