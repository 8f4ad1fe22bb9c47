#include "layer_nonfinite.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "../core/thread_pool.h"
#include "spans.h"

namespace metagpt_fast::cpu {
namespace {

struct Found {
  std::int64_t count = 0;
  std::int64_t first = -1;  // within the span
};

constexpr std::size_t kBlock = 1024;

// An element is NaN or Inf if all bits of its exponent are set. Blocks without one are passed over by a loop that has
// no branches, which compilers turn into vector instructions.
template <class Bits>
Found find_nonfinite(const std::byte* data, std::size_t numel, Bits exponent_mask) {
  const auto is_nonfinite = [=](std::size_t e) {
    Bits bits;
    std::memcpy(&bits, data + e * sizeof(Bits), sizeof(Bits));
    return (bits & exponent_mask) == exponent_mask;
  };
  Found found;
  for (std::size_t begin = 0; begin < numel; begin += kBlock) {
    const std::size_t end = std::min(numel, begin + kBlock);
    Bits any = 0;
    for (std::size_t e = begin; e < end; ++e) any |= static_cast<Bits>(is_nonfinite(e));
    if (any == 0) continue;
    for (std::size_t e = begin; e < end; ++e) {
      if (is_nonfinite(e) && found.count++ == 0) found.first = static_cast<std::int64_t>(e);
    }
  }
  return found;
}

Found find_nonfinite(Operand operand, std::size_t numel) {
  switch (operand.dtype) {
    case DType::kF32:
      return find_nonfinite<std::uint32_t>(operand.data, numel, 0x7f800000u);
    case DType::kF16:
      return find_nonfinite<std::uint16_t>(operand.data, numel, 0x7c00u);
    case DType::kBF16:
      return find_nonfinite<std::uint16_t>(operand.data, numel, 0x7f80u);
    case DType::kF64:
      return find_nonfinite<std::uint64_t>(operand.data, numel, 0x7ff0000000000000u);
  }
  return {};
}

}  // namespace

void layer_nonfinite(const Layer& layer, std::int64_t* counts, std::int64_t* first) {
  const std::size_t num_operands = layer.num_operands;
  const std::vector<Span> spans = cut_into_spans(layer);
  std::vector<Found> found(spans.size() * num_operands);
  const int num_workers = num_threads();
  std::vector<ThreadScratch> scratch = make_scratch(num_operands, num_workers);
  parallel_for(spans.size(), num_workers, [&](std::size_t item, int worker) {
    const Operand* operands = scratch[static_cast<std::size_t>(worker)].load(layer, spans[item]);
    for (std::size_t i = 0; i < num_operands; ++i) {
      found[item * num_operands + i] = find_nonfinite(operands[i], spans[item].numel);
    }
  });
  std::fill_n(counts, layer.num_tensors * num_operands, 0);
  std::fill_n(first, layer.num_tensors * num_operands, -1);
  for (std::size_t item = 0; item < spans.size(); ++item) {
    for (std::size_t i = 0; i < num_operands; ++i) {
      const Found& part = found[item * num_operands + i];
      const std::size_t entry = spans[item].tensor * num_operands + i;
      if (part.count > 0 && counts[entry] == 0)
        first[entry] = static_cast<std::int64_t>(spans[item].first) + part.first;
      counts[entry] += part.count;
    }
  }
}

}  // namespace metagpt_fast::cpu
