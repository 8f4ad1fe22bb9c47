#include "isa.h"
#include "merge_spans.h"
#include "per_column.h"

namespace metagpt_fast::cpu {

void column_merge(const Layer& layer, const std::int64_t* columns, const std::uint64_t* coefficients,
                  const LayerOutput& out, std::int64_t* num_nonfinite) {
  const KernelTable& table = kernels();
  merge_spans(layer, cut_into_row_spans(layer, columns), out, num_nonfinite,
              [&](const Operand* operands, const Span& span, const Workspace& workspace, std::byte* destination,
                  DType out_dtype) {
                const auto row_numel = static_cast<std::size_t>(columns[span.tensor]);
                const std::size_t column = span.first % row_numel;  // not 0 only in a part of a row
                const auto* mine = reinterpret_cast<const double*>(coefficients[span.tensor]);
                return table.column_merge_span(operands, layer.num_operands, layer.has_base, span.numel,
                                               row_numel - column, mine + column * layer.num_models(), workspace,
                                               destination, out_dtype);
              });
}

}  // namespace metagpt_fast::cpu
