#include "span_outputs.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "../core/file_io.h"

namespace metagpt_fast::cpu {

std::byte* PendingOutput::place(int file, std::uint64_t address, std::size_t nbytes, std::size_t tensor) {
  if (nbytes_ > 0 && (file != file_ || address != address_ + nbytes_)) write();
  if (nbytes_ == 0) {
    file_ = file;
    address_ = address;
    tensor_ = tensor;
  }
  nbytes_ += nbytes;
  return buffer_ + nbytes_ - nbytes;
}

void PendingOutput::write() {
  const int status = write_exactly(file_, address_, buffer_, nbytes_);
  if (status >= 0) {
    throw FileOperandError("cannot write " + std::to_string(nbytes_) + " bytes at offset " + std::to_string(address_) +
                               ": " + std::strerror(status),
                           status, tensor_, -1);
  }
  nbytes_ = 0;
}

SpanOutputs::SpanOutputs(const Layer& layer, const std::vector<Span>& spans, const LayerOutput& out)
    : num_tensors_(layer.num_tensors), spans_(spans), out_(out), num_nonfinite_(spans.size()), crcs_(spans.size()) {
  for (std::size_t k = 0; k < num_tensors_; ++k) {
    if (out.dtypes[k] >= kNumDTypes) throw std::invalid_argument("out_dtypes: got an unknown dtype code");
  }
}

void SpanOutputs::finish(std::int64_t* num_nonfinite) const {
  std::fill_n(num_nonfinite, num_tensors_, 0);
  for (std::size_t item = 0; item < spans_.size(); ++item) num_nonfinite[spans_[item].tensor] += num_nonfinite_[item];
  if (out_.crcs == nullptr) return;
  std::fill_n(out_.crcs, num_tensors_, 0u);
  Crc32cSequence sequence;
  for (std::size_t item = 0; item < spans_.size();) {  // a tensor's spans follow one another, ascending
    const std::size_t tensor = spans_[item].tensor;
    sequence.restart();
    for (; item < spans_.size() && spans_[item].tensor == tensor; ++item) {
      if (out_.files[tensor] >= 0) sequence.append(crcs_[item], nbytes_of(item));
    }
    out_.crcs[tensor] = sequence.value();
  }
}

}  // namespace metagpt_fast::cpu
