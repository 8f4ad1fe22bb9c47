#include "spans.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "../core/file_io.h"

namespace metagpt_fast::cpu {

namespace {

void check_layer(const Layer& layer) {
  for (std::size_t k = 0; k < layer.num_tensors; ++k) {
    if (layer.numels[k] < 0) throw std::invalid_argument("numels: got a negative number of elements");
  }
  for (std::size_t i = 0; i < layer.num_tensors * layer.num_operands; ++i) {
    if (layer.dtypes[i] >= kNumDTypes) {
      throw std::invalid_argument("dtypes: got code " + std::to_string(layer.dtypes[i]) + ", expected 0 to " +
                                  std::to_string(kNumDTypes - 1));
    }
  }
}

void cut_run(std::size_t tensor, std::size_t first, std::size_t end, std::size_t step, std::vector<Span>& spans) {
  for (; first < end; first += step) spans.push_back({tensor, first, std::min(step, end - first)});
}

}  // namespace

std::vector<Span> cut_into_spans(const Layer& layer) {
  check_layer(layer);
  std::vector<Span> spans;
  for (std::size_t k = 0; k < layer.num_tensors; ++k) {
    cut_run(k, 0, static_cast<std::size_t>(layer.numels[k]), kSpanNumel, spans);
  }
  return spans;
}

std::vector<Span> cut_into_row_spans(const Layer& layer, const std::int64_t* columns) {
  check_layer(layer);
  std::vector<Span> spans;
  for (std::size_t k = 0; k < layer.num_tensors; ++k) {
    const auto numel = static_cast<std::size_t>(layer.numels[k]);
    if (numel == 0) continue;
    if (columns[k] < 1 || layer.numels[k] % columns[k] != 0) {
      throw std::invalid_argument("columns: got " + std::to_string(columns[k]) + " for a tensor of " +
                                  std::to_string(numel) + " elements, expected a divisor");
    }
    const auto row_numel = static_cast<std::size_t>(columns[k]);
    if (row_numel <= kSpanNumel) {
      cut_run(k, 0, numel, kSpanNumel / row_numel * row_numel, spans);
    } else {
      for (std::size_t row = 0; row < numel; row += row_numel) cut_run(k, row, row + row_numel, kSpanNumel, spans);
    }
  }
  return spans;
}

std::vector<std::size_t> group_spans(const std::vector<Span>& spans, int num_workers) {
  std::size_t total = 0;
  for (const Span& span : spans) total += span.numel;
  // Few small tensors are still spread over the threads.
  const std::size_t limit = std::min(kSpanNumel, total / (static_cast<std::size_t>(num_workers) * 8));
  std::vector<std::size_t> starts{0};
  std::size_t numel = 0;
  for (std::size_t item = 0; item < spans.size(); ++item) {
    if (item > starts.back() && numel + spans[item].numel > limit) {
      starts.push_back(item);
      numel = 0;
    }
    numel += spans[item].numel;
  }
  if (!spans.empty()) starts.push_back(spans.size());
  return starts;
}

std::byte* ThreadScratch::grow(Buffer& buffer, std::size_t nbytes) {
  if (buffer.nbytes < nbytes) {
    buffer.memory = std::make_unique_for_overwrite<std::byte[]>(nbytes);
    buffer.nbytes = nbytes;
  }
  return buffer.memory.get();
}

void ThreadScratch::forget_files() {
  for (FileBuffer& buffer : file_buffers_) buffer.file = -1;
}

// Reads the operand of `span`, and those of the spans after it that continue it in the file.
int ThreadScratch::read_ahead(const Layer& layer, const Span* span, const Span* group_end, std::size_t operand,
                              FileBuffer& into) {
  std::uint64_t nbytes_of_first = 0;
  for (const Span* next = span; next < group_end; ++next) {
    const std::size_t entry = next->tensor * num_operands_ + operand;
    const std::size_t size = itemsize(static_cast<DType>(layer.dtypes[entry]));
    const std::uint64_t begin = layer.addresses[entry] + next->first * size;
    if (next == span) {
      into.file = layer.files[entry];
      into.begin = into.end = begin;
      nbytes_of_first = next->numel * size;
    } else if (layer.files[entry] != into.file || begin != into.end) {
      break;
    }
    into.end += next->numel * size;
  }
  const std::size_t nbytes = into.end - into.begin;
  int status = read_exactly(into.file, into.begin, grow(into.buffer, nbytes), nbytes);
  if (status >= 0 && nbytes > nbytes_of_first) {  // an error belongs to the span that it is in
    into.end = into.begin + nbytes_of_first;
    status = read_exactly(into.file, into.begin, into.buffer.memory.get(), nbytes_of_first);
  }
  return status;
}

const Operand* ThreadScratch::load(const Layer& layer, const Span* span, const Span* group_end) {
  for (std::size_t i = 0; i < num_operands_; ++i) {
    const std::size_t entry = span->tensor * num_operands_ + i;
    const auto dtype = static_cast<DType>(layer.dtypes[entry]);
    const std::uint64_t address = layer.addresses[entry] + span->first * itemsize(dtype);
    const int file = layer.files[entry];
    if (file < 0) {
      operands_[i] = {reinterpret_cast<const std::byte*>(address), dtype};
      continue;
    }
    if (file_buffers_.empty()) file_buffers_.resize(num_operands_);
    FileBuffer& buffer = file_buffers_[i];
    const std::size_t nbytes = span->numel * itemsize(dtype);
    if (buffer.file != file || address < buffer.begin || address + nbytes > buffer.end) {
      const int status = read_ahead(layer, span, group_end, i, buffer);
      if (status >= 0) {
        const std::string reason = status == 0 ? "the file ended early" : std::strerror(status);
        throw FileOperandError(
            "cannot read " + std::to_string(nbytes) + " bytes at offset " + std::to_string(address) + ": " + reason,
            status, span->tensor, static_cast<int>(i));
      }
    }
    operands_[i] = {buffer.buffer.memory.get() + (address - buffer.begin), dtype};
  }
  return operands_.data();
}

const Workspace& ThreadScratch::workspace() {
  if (workspace_.values == nullptr) {
    // The merge needs two rows of values, and one of coefficients per model.
    const std::size_t values_nbytes = (num_operands_ + 2) * kChunkNumel * sizeof(double);
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
