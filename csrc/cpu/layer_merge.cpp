#include "layer_merge.h"

#include "isa.h"
#include "merge_spans.h"

namespace metagpt_fast::cpu {

void layer_merge(const Layer& layer, const double* coefficients, const LayerOutput& out, std::int64_t* num_nonfinite) {
  const KernelTable& table = kernels();
  merge_spans(layer, cut_into_spans(layer), out, num_nonfinite,
              [&](const Operand* operands, const Span& span, const Workspace& workspace, std::byte* destination,
                  DType out_dtype) {
                return table.merge_span(operands, layer.num_operands, layer.has_base, span.numel,
                                        coefficients + span.tensor * layer.num_models(), workspace, destination,
                                        out_dtype);
              });
}

}  // namespace metagpt_fast::cpu
