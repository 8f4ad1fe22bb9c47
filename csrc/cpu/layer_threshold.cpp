#include "layer_threshold.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "../core/thread_pool.h"
#include "isa.h"
#include "sparse_spans.h"

namespace metagpt_fast::cpu {
namespace {

constexpr std::uint32_t kNoKey = 0xffffffffu;

void check_ranks(const Layer& layer, const std::int64_t* ranks, std::size_t ranks_per_tensor) {
  for (std::size_t i = 0; i < layer.num_tensors * ranks_per_tensor; ++i) {
    if (ranks[i] >= -1 && ranks[i] < std::max<std::int64_t>(layer.numels[i / ranks_per_tensor], 0)) continue;
    if (ranks[i] == -1) continue;
    throw std::invalid_argument("ranks: got " + std::to_string(ranks[i]) + " for a tensor of " +
                                std::to_string(layer.numels[i / ranks_per_tensor]) + " elements");
  }
}

}  // namespace

void layer_threshold(const Layer& layer, const KeyTable& table, const std::int64_t* ranks, std::size_t num_ranks,
                     std::uint32_t* keys, std::int64_t* indices) {
  const std::vector<Span> spans = cut_into_spans(layer);
  check_keys(layer, table);
  const std::size_t per_element = num_keys(layer, table);
  check_ranks(layer, ranks, per_element * num_ranks);
  const SparseKernels& kernel = kernels().sparse;
  const int num_workers = num_threads();
  std::vector<SparseScratch> scratch = make_sparse_scratch(layer.num_operands, num_workers);
  parallel_for(layer.num_tensors * per_element, num_workers, [&](std::size_t item, int worker) {
    SparseScratch& mine = scratch[static_cast<std::size_t>(worker)];
    const std::size_t k = item / per_element;
    const auto numel = static_cast<std::size_t>(layer.numels[k]);
    std::vector<std::uint32_t> tensor_keys(numel);
    std::vector<std::size_t> order(numel);
    if (numel > 0) {
      kernel.keys(mine.load(layer, {k, 0, numel}), layer.num_models(), item % per_element, 0, 0, numel,
                  key_rule(table, k), mine.rows(), tensor_keys.data());
    }
    for (std::size_t e = 0; e < numel; ++e) order[e] = e;
    for (std::size_t i = item * num_ranks; i < (item + 1) * num_ranks; ++i) {
      keys[i] = kNoKey;
      indices[i] = -1;
      if (ranks[i] < 0) continue;
      std::nth_element(order.begin(), order.begin() + ranks[i], order.end(), [&](std::size_t a, std::size_t b) {
        return tensor_keys[a] != tensor_keys[b] ? tensor_keys[a] > tensor_keys[b] : a < b;
      });
      const std::size_t found = order[static_cast<std::size_t>(ranks[i])];
      keys[i] = tensor_keys[found];
      indices[i] = static_cast<std::int64_t>(found);
    }
  });
}

void layer_count_nonzero(const Layer& layer, const KeyTable& table, std::int64_t* counts) {
  const std::vector<Span> spans = cut_into_spans(layer);
  check_keys(layer, table);
  const SparseKernels& kernel = kernels().sparse;
  const std::size_t per_element = num_keys(layer, table);
  std::vector<std::int64_t> span_counts(spans.size() * per_element);
  const int num_workers = num_threads();
  std::vector<SparseScratch> scratch = make_sparse_scratch(layer.num_operands, num_workers);
  parallel_for(spans.size(), num_workers, [&](std::size_t item, int worker) {
    SparseScratch& mine = scratch[static_cast<std::size_t>(worker)];
    const Span& span = spans[item];
    const Operand* operands = mine.load(layer, span);
    std::uint32_t* keys = mine.key_buffer();
    for (std::size_t j = 0; j < per_element; ++j) {
      kernel.keys(operands, layer.num_models(), j, 0, span.first, span.numel, key_rule(table, span.tensor), mine.rows(),
                  keys);
      for (std::size_t e = 0; e < span.numel; ++e) span_counts[item * per_element + j] += keys[e] > 0;
    }
  });
  std::fill_n(counts, layer.num_tensors * per_element, 0);
  for (std::size_t i = 0; i < span_counts.size(); ++i) {
    counts[spans[i / per_element].tensor * per_element + i % per_element] += span_counts[i];
  }
}

}  // namespace metagpt_fast::cpu
