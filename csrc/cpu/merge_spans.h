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

// Results on their way to a file. Those that follow one another there are written together.
class PendingOutput {
 public:
  explicit PendingOutput(std::byte* buffer) : buffer_(buffer) {}

  // Where the next result goes until it is written.
  std::byte* place(int file, std::uint64_t address, std::size_t nbytes, std::size_t tensor) {
    if (nbytes_ > 0 && (file != file_ || address != address_ + nbytes_)) write();
    if (nbytes_ == 0) {
      file_ = file;
      address_ = address;
      tensor_ = tensor;
    }
    nbytes_ += nbytes;
    return buffer_ + nbytes_ - nbytes;
  }

  // Throws FileOperandError, with the first tensor of what could not be written.
  void write() {
    const int status = write_exactly(file_, address_, buffer_, nbytes_);
    if (status >= 0) {
      throw FileOperandError("cannot write " + std::to_string(nbytes_) + " bytes at offset " +
                                 std::to_string(address_) + ": " + std::strerror(status),
                             status, tensor_, -1);
    }
    nbytes_ = 0;
  }

 private:
  std::byte* buffer_;
  std::size_t nbytes_ = 0;
  int file_ = -1;
  std::uint64_t address_ = 0;
  std::size_t tensor_ = 0;
};

// Calls kernel(operands, span, workspace, destination, out_dtype) -> number of NaN and Inf written, for every span, and
// sets num_nonfinite[k] to the sum over the spans of tensor k.
template <class Kernel>
void merge_spans(const Layer& layer, const std::vector<Span>& spans, const LayerOutput& out,
                 std::int64_t* num_nonfinite, Kernel kernel) {
  for (std::size_t k = 0; k < layer.num_tensors; ++k) {
    if (out.dtypes[k] >= kNumDTypes) throw std::invalid_argument("out_dtypes: got an unknown dtype code");
  }
  const auto nbytes_of = [&](const Span& span) {
    return span.numel * itemsize(static_cast<DType>(out.dtypes[span.tensor]));
  };
  std::vector<std::int64_t> span_nonfinite(spans.size(), 0);
  const int num_workers = num_threads();
  std::vector<ThreadScratch> scratch = make_scratch(layer.num_operands, num_workers);
  const std::vector<std::size_t> groups = group_spans(spans, num_workers);
  parallel_for(groups.size() - 1, num_workers, [&](std::size_t group, int worker) {
    ThreadScratch& mine = scratch[static_cast<std::size_t>(worker)];
    mine.forget_files();
    std::size_t buffer_nbytes = 0;
    for (std::size_t item = groups[group]; item < groups[group + 1]; ++item) {
      if (out.files[spans[item].tensor] >= 0) buffer_nbytes += nbytes_of(spans[item]);
    }
    PendingOutput pending(mine.output_buffer(buffer_nbytes));
    for (std::size_t item = groups[group]; item < groups[group + 1]; ++item) {
      const Span& span = spans[item];
      const auto out_dtype = static_cast<DType>(out.dtypes[span.tensor]);
      const std::uint64_t address = out.addresses[span.tensor] + span.first * itemsize(out_dtype);
      const int file = out.files[span.tensor];
      const Operand* operands = mine.load(layer, &span, spans.data() + groups[group + 1]);
      std::byte* destination =
          file < 0 ? reinterpret_cast<std::byte*>(address) : pending.place(file, address, nbytes_of(span), span.tensor);
      span_nonfinite[item] =
          static_cast<std::int64_t>(kernel(operands, span, mine.workspace(), destination, out_dtype));
    }
    if (buffer_nbytes > 0) pending.write();
  });
  std::fill_n(num_nonfinite, layer.num_tensors, 0);
  for (std::size_t item = 0; item < spans.size(); ++item) num_nonfinite[spans[item].tensor] += span_nonfinite[item];
}

}  // namespace metagpt_fast::cpu
