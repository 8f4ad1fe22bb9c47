#include "layer_elect.h"

#include <vector>

#include "../core/thread_pool.h"
#include "isa.h"
#include "span_outputs.h"
#include "sparse_spans.h"

namespace metagpt_fast::cpu {
namespace {

ElectionRule election_rule(const ElectionTable& table, std::size_t tensor, std::size_t num_models) {
  const std::size_t row = tensor * num_models;
  return {table.scales + row,    table.votes + row,    table.weights + row,       table.uniques + row,
          table.lambdas[tensor], table.floors[tensor], table.elects[tensor] != 0, table.normalizes[tensor] != 0};
}

}  // namespace

void layer_elect(const Layer& layer, const MaskTable& masks, const ElectionTable& election, const LayerOutput& out,
                 std::int64_t* num_nonfinite) {
  const std::vector<Span> spans = cut_into_spans(layer);
  check_masks(layer, masks);
  SpanOutputs outputs(layer, spans, out);
  const KernelTable& table = kernels();
  const int num_workers = num_threads();
  std::vector<SparseScratch> scratch = make_sparse_scratch(layer.num_operands, num_workers);
  parallel_for(spans.size(), num_workers, [&](std::size_t number, int worker) {
    SparseScratch& mine = scratch[static_cast<std::size_t>(worker)];
    outputs.run(number, number + 1, mine, [&](std::size_t item, std::byte* destination, DType out_dtype) {
      const Span& span = spans[item];
      return table.sparse.elect(mine.load_run(layer, masks, span, true),
                                election_rule(election, span.tensor, layer.num_models()), mine.rows(), destination,
                                out_dtype);
    });
  });
  outputs.finish(num_nonfinite);
}

}  // namespace metagpt_fast::cpu
