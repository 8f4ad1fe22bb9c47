#include "layer_elect.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "../core/file_io.h"
#include "../core/thread_pool.h"
#include "isa.h"
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
  for (std::size_t k = 0; k < layer.num_tensors; ++k) {
    if (out.dtypes[k] >= kNumDTypes) throw std::invalid_argument("out_dtypes: got an unknown dtype code");
  }
  const KernelTable& table = kernels();
  std::vector<std::int64_t> span_nonfinite(spans.size(), 0);
  const int num_workers = num_threads();
  std::vector<SparseScratch> scratch = make_sparse_scratch(layer.num_operands, num_workers);
  parallel_for(spans.size(), num_workers, [&](std::size_t item, int worker) {
    SparseScratch& mine = scratch[static_cast<std::size_t>(worker)];
    const Span& span = spans[item];
    const auto out_dtype = static_cast<DType>(out.dtypes[span.tensor]);
    const std::size_t nbytes = span.numel * itemsize(out_dtype);
    const std::uint64_t address = out.addresses[span.tensor] + span.first * itemsize(out_dtype);
    const int file = out.files[span.tensor];
    std::byte* destination = file < 0 ? reinterpret_cast<std::byte*>(address) : mine.output_buffer(nbytes);
    span_nonfinite[item] = static_cast<std::int64_t>(table.sparse.elect(
        mine.load_run(layer, masks, span, true), election_rule(election, span.tensor, layer.num_models()), mine.rows(),
        destination, out_dtype));
    if (file < 0) return;
    const int status = write_exactly(file, address, destination, nbytes);
    if (status >= 0) {
      throw FileOperandError("cannot write " + std::to_string(nbytes) + " bytes at offset " + std::to_string(address) +
                                 ": " + std::strerror(status),
                             status, span.tensor, -1);
    }
  });
  std::fill_n(num_nonfinite, layer.num_tensors, 0);
  for (std::size_t item = 0; item < spans.size(); ++item) num_nonfinite[spans[item].tensor] += span_nonfinite[item];
}

}  // namespace metagpt_fast::cpu
