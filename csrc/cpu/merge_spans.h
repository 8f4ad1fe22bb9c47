// What layer_merge and column_merge share: items go through a kernel to memory or to a file.
#pragma once

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "../core/file_io.h"
#include "../core/thread_pool.h"
#include "spans.h"

namespace metagpt_fast::cpu {

// Calls kernel(operands, span, workspace, destination, out_dtype) -> number of NaN and Inf written, for every span, and
// sets num_nonfinite[k] to the sum over the spans of tensor k.
template <class Kernel>
void merge_spans(const Layer& layer, const std::vector<Span>& spans, const LayerOutput& out,
                 std::int64_t* num_nonfinite, Kernel kernel) {
  for (std::size_t k = 0; k < layer.num_tensors; ++k) {
    if (out.dtypes[k] >= kNumDTypes) throw std::invalid_argument("out_dtypes: got an unknown dtype code");
  }
  std::vector<std::int64_t> span_nonfinite(spans.size(), 0);
  const int num_workers = num_threads();
  std::vector<ThreadScratch> scratch = make_scratch(layer.num_operands, num_workers);
  parallel_for(spans.size(), num_workers, [&](std::size_t item, int worker) {
    ThreadScratch& mine = scratch[static_cast<std::size_t>(worker)];
    const Span& span = spans[item];
    const auto out_dtype = static_cast<DType>(out.dtypes[span.tensor]);
    const std::size_t nbytes = span.numel * itemsize(out_dtype);
    const std::uint64_t address = out.addresses[span.tensor] + span.first * itemsize(out_dtype);
    const int file = out.files[span.tensor];
    std::byte* destination = file < 0 ? reinterpret_cast<std::byte*>(address) : mine.output_buffer(nbytes);
    const Operand* operands = mine.load(layer, span);
    span_nonfinite[item] = static_cast<std::int64_t>(kernel(operands, span, mine.workspace(), destination, out_dtype));
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
