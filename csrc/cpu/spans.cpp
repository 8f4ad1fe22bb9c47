#include "spans.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "../core/file_io.h"

namespace metagpt_fast::cpu {

std::vector<Span> cut_into_spans(const Layer& layer) {
  std::vector<Span> spans;
  for (std::size_t k = 0; k < layer.num_tensors; ++k) {
    if (layer.numels[k] < 0) throw std::invalid_argument("numels: got a negative number of elements");
    const auto numel = static_cast<std::size_t>(layer.numels[k]);
    for (std::size_t first = 0; first < numel; first += kSpanNumel) {
      spans.push_back({k, first, std::min(kSpanNumel, numel - first)});
    }
  }
  for (std::size_t i = 0; i < layer.num_tensors * layer.num_operands; ++i) {
    if (layer.dtypes[i] >= kNumDTypes) {
      throw std::invalid_argument("dtypes: got code " + std::to_string(layer.dtypes[i]) + ", expected 0 to " +
                                  std::to_string(kNumDTypes - 1));
    }
  }
  return spans;
}

std::byte* ThreadScratch::grow(Buffer& buffer, std::size_t nbytes) {
  if (buffer.nbytes < nbytes) {
    buffer.memory = std::make_unique_for_overwrite<std::byte[]>(nbytes);
    buffer.nbytes = nbytes;
  }
  return buffer.memory.get();
}

const Operand* ThreadScratch::load(const Layer& layer, const Span& span) {
  for (std::size_t i = 0; i < num_operands_; ++i) {
    const std::size_t entry = span.tensor * num_operands_ + i;
    const auto dtype = static_cast<DType>(layer.dtypes[entry]);
    const std::uint64_t address = layer.addresses[entry] + span.first * itemsize(dtype);
    if (layer.files[entry] < 0) {
      operands_[i] = {reinterpret_cast<const std::byte*>(address), dtype};
      continue;
    }
    if (file_buffers_.empty()) file_buffers_.resize(num_operands_);
    const std::size_t nbytes = span.numel * itemsize(dtype);
    std::byte* buffer = grow(file_buffers_[i], nbytes);
    const int status = read_exactly(layer.files[entry], address, buffer, nbytes);
    if (status >= 0) {
      const std::string reason = status == 0 ? "the file ended early" : std::strerror(status);
      throw FileOperandError(
          "cannot read " + std::to_string(nbytes) + " bytes at offset " + std::to_string(address) + ": " + reason,
          status, span.tensor, static_cast<int>(i));
    }
    operands_[i] = {buffer, dtype};
  }
  return operands_.data();
}

const Workspace& ThreadScratch::workspace() {
  if (workspace_.values == nullptr) {
    // The merge needs two rows of values whatever the number of operands.
    const std::size_t values_nbytes = std::max<std::size_t>(num_operands_, 2) * kChunkNumel * sizeof(double);
    const std::size_t lanes_nbytes = num_operands_ * num_operands_ * kNumLanes * sizeof(double);
    std::byte* memory = grow(scratch_, values_nbytes + lanes_nbytes + 64);
    const std::size_t misalignment = reinterpret_cast<std::uintptr_t>(memory) % 64;
    workspace_.values = memory + (64 - misalignment) % 64;
    workspace_.lanes = workspace_.values + values_nbytes;
    sums_.resize(num_operands_ * num_operands_);
    workspace_.sums = sums_.data();
  }
  return workspace_;
}

std::vector<ThreadScratch> make_scratch(std::size_t num_operands, int num_workers) {
  std::vector<ThreadScratch> scratch;
  scratch.reserve(static_cast<std::size_t>(num_workers));
  for (int worker = 0; worker < num_workers; ++worker) scratch.emplace_back(num_operands);
  return scratch;
}

}  // namespace metagpt_fast::cpu
