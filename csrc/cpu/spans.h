// A layer cut into work items: what a thread takes from the queue.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "../core/layer.h"
#include "kernel_table.h"

namespace metagpt_fast::cpu {

struct Span {
  std::size_t tensor;  // index in the layer
  std::size_t first;   // element
  std::size_t numel;
};

// All items of the layer, tensor by tensor, ascending. Throws std::invalid_argument for a negative numel or an
// unknown dtype.
std::vector<Span> cut_into_spans(const Layer& layer);

// The same for tensors seen as rows of columns[k] elements: an item is several whole rows, or, of a row longer than
// kSpanNumel, a part of that row. Throws std::invalid_argument also where the rows do not add up to the tensor.
std::vector<Span> cut_into_row_spans(const Layer& layer, const std::int64_t* columns);

// Consecutive spans that a thread takes together, so that thousands of small tensors cost no more than their bytes:
// group g is [result[g], result[g + 1]), at most kSpanNumel elements. No result depends on it.
std::vector<std::size_t> group_spans(const std::vector<Span>& spans, int num_workers);

// What one thread needs while it works on items: kernel scratch, and buffers for file operands and file output.
class ThreadScratch {
 public:
  explicit ThreadScratch(std::size_t num_operands) : num_operands_(num_operands), operands_(num_operands) {}

  // The item's operands as memory: file operands are read into buffers. Throws FileOperandError.
  const Operand* load(const Layer& layer, const Span& span) {
    forget_files();
    return load(layer, &span, &span + 1);
  }

  // The same for the next span of a group, which ends before `group_end`: what follows in the file and belongs to later
  // spans of the group is read in one go. A group begins with forget_files.
  const Operand* load(const Layer& layer, const Span* span, const Span* group_end);
  void forget_files();

  // Scratch for a kernel call on `num_operands` operands.
  const Workspace& workspace();

  // A buffer for one item's output.
  std::byte* output_buffer(std::size_t nbytes) { return grow(output_, nbytes); }

 private:
  struct Buffer {
    std::unique_ptr<std::byte[]> memory;
    std::size_t nbytes = 0;
  };
  static std::byte* grow(Buffer& buffer, std::size_t nbytes);

  struct FileBuffer {
    Buffer buffer;
    int file = -1;  // the buffer holds bytes [begin, end) of it
    std::uint64_t begin = 0;
    std::uint64_t end = 0;
  };
  int read_ahead(const Layer& layer, const Span* span, const Span* group_end, std::size_t operand, FileBuffer& into);

  std::size_t num_operands_;
  std::vector<Operand> operands_;
  std::vector<FileBuffer> file_buffers_;
  Buffer output_;
  Buffer scratch_;
  std::vector<double> sums_;
  Workspace workspace_;
};

// One scratch for every worker of a parallel_for.
std::vector<ThreadScratch> make_scratch(std::size_t num_operands, int num_workers);

}  // namespace metagpt_fast::cpu
