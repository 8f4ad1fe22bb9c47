// The results of spans on their way to memory or to a file: written, counted and checksummed in one place.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "../core/crc32c.h"
#include "spans.h"

namespace metagpt_fast::cpu {

// Results on their way to a file. Those that follow one another there are written together.
class PendingOutput {
 public:
  explicit PendingOutput(std::byte* buffer) : buffer_(buffer) {}

  // Where the next result goes until it is written.
  std::byte* place(int file, std::uint64_t address, std::size_t nbytes, std::size_t tensor);

  // Throws FileOperandError, with the first tensor of what could not be written.
  void write();

 private:
  std::byte* buffer_;
  std::size_t nbytes_ = 0;
  int file_ = -1;
  std::uint64_t address_ = 0;
  std::size_t tensor_ = 0;
};

// The results of a kernel call on a layer; all arguments outlive it.
class SpanOutputs {
 public:
  // Throws std::invalid_argument for an unknown dtype.
  SpanOutputs(const Layer& layer, const std::vector<Span>& spans, const LayerOutput& out);

  // Calls kernel(item, destination, out_dtype) -> number of NaN and Inf written, for the spans [first, end), and
  // writes what goes to files. Threads may do so for different spans. `scratch` has the buffer. Throws
  // FileOperandError.
  template <class Scratch, class Kernel>
  void run(std::size_t first, std::size_t end, Scratch& scratch, Kernel kernel) {
    std::size_t buffer_nbytes = 0;
    for (std::size_t item = first; item < end; ++item) {
      if (file_of(item) >= 0) buffer_nbytes += nbytes_of(item);
    }
    PendingOutput pending(scratch.output_buffer(buffer_nbytes));
    for (std::size_t item = first; item < end; ++item) {
      const DType dtype = dtype_of(item);
      const std::uint64_t address = out_.addresses[spans_[item].tensor] + spans_[item].first * itemsize(dtype);
      const int file = file_of(item);
      std::byte* destination = file < 0 ? reinterpret_cast<std::byte*>(address)
                                        : pending.place(file, address, nbytes_of(item), spans_[item].tensor);
      num_nonfinite_[item] = static_cast<std::int64_t>(kernel(item, destination, dtype));
      // Now, while the bytes are in the cache, and not by reading the file again.
      if (file >= 0 && out_.crcs != nullptr) crcs_[item] = crc32c(destination, nbytes_of(item));
    }
    if (buffer_nbytes > 0) pending.write();
  }

  // After all spans: what they add up to for every tensor. num_nonfinite: [K]. Sets out.crcs, too, if they are wanted.
  void finish(std::int64_t* num_nonfinite) const;

 private:
  int file_of(std::size_t item) const { return out_.files[spans_[item].tensor]; }
  DType dtype_of(std::size_t item) const { return static_cast<DType>(out_.dtypes[spans_[item].tensor]); }
  std::size_t nbytes_of(std::size_t item) const { return spans_[item].numel * itemsize(dtype_of(item)); }

  std::size_t num_tensors_;
  const std::vector<Span>& spans_;
  const LayerOutput& out_;
  std::vector<std::int64_t> num_nonfinite_;  // by span
  std::vector<std::uint32_t> crcs_;          // by span
};

}  // namespace metagpt_fast::cpu
