#include "sparse_spans.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "isa.h"

namespace metagpt_fast::cpu {
namespace {

void check_columns(const Layer& layer, const KeyTable& keys, std::size_t tensor) {
  const std::int64_t numel = layer.numels[tensor];
  const std::int64_t columns = keys.columns[tensor];
  if (numel > 0 && (columns < 1 || numel % columns != 0)) {
    throw std::invalid_argument("columns: got " + std::to_string(columns) + " for a tensor of " +
                                std::to_string(numel) + " elements, expected a divisor");
  }
}

}  // namespace

void check_keys(const Layer& layer, const KeyTable& keys) {
  if (!layer.has_base) throw std::invalid_argument("sparse kernels: expected a base");
  if (keys.kind < 0 || keys.kind >= kNumKeyKinds) throw std::invalid_argument("key_kind: got an unknown kind");
  if (keys.kind != static_cast<int>(KeyKind::kImportance)) return;
  for (std::size_t k = 0; k < layer.num_tensors; ++k) check_columns(layer, keys, k);
}

void check_masks(const Layer& layer, const MaskTable& masks) {
  check_keys(layer, masks.key);
  for (std::size_t i = 0; i < layer.num_tensors * layer.num_models(); ++i) {
    if (masks.kinds[i] >= kNumMaskKinds) throw std::invalid_argument("kinds: got an unknown kind of mask");
    const bool is_whole = masks.kinds[i] == static_cast<int>(MaskKind::kAll);
    if (masks.bits[i] != 0 && (is_whole || masks.kinds[i] == static_cast<int>(MaskKind::kNear))) {
      throw std::invalid_argument("bits: got an address for a mask that is not made of bits");
    }
    const bool is_ranked = masks.kinds[i] == static_cast<int>(MaskKind::kRanked);
    if (is_ranked) check_columns(layer, masks.key, i / layer.num_models());
    for (std::size_t end = 0; end < 2; ++end) {
      if (masks.probabilities[2 * i + end] > std::uint64_t{1} << 32) {
        throw std::invalid_argument("probabilities: got more than 2^32");
      }
    }
  }
}

KeyRule key_rule(const KeyTable& keys, std::size_t tensor) {
  return {static_cast<KeyKind>(keys.kind), static_cast<std::size_t>(keys.columns[tensor]),
          reinterpret_cast<const double*>(keys.row_factors[tensor])};
}

SparseScratch::SparseScratch(std::size_t num_operands) : operands_(num_operands), whole_rows_(num_operands) {
  const std::size_t num_models = num_operands - 1;
  std::size_t nbytes = 64;
  const auto take = [&nbytes](std::size_t size) {
    const std::size_t start = nbytes;
    nbytes += (size + 63) / 64 * 64;
    return start;
  };
  constexpr std::size_t kWideRow = kChunkNumel * sizeof(double);
  constexpr std::size_t kRow = kChunkNumel * sizeof(std::uint32_t);
  const std::size_t base = take(kWideRow);
  const std::size_t deltas = take(num_models * kWideRow);
  const std::size_t keys = take(kRow);
  const std::size_t masks = take(num_models * kRow);
  const std::size_t weights = take(num_models * kWideRow);
  const std::size_t sums = take(SparseRows::kNumSumRows * kWideRow);
  const std::size_t lanes = take(num_models * 4 * kNumLanes * sizeof(double));
  const std::size_t integers = take(2 * kRow);
  memory_ = std::make_unique<std::byte[]>(nbytes);
  std::byte* aligned = memory_.get() - reinterpret_cast<std::uintptr_t>(memory_.get()) % 64;
  rows_.base = aligned + base;
  rows_.deltas = aligned + deltas;
  rows_.keys = reinterpret_cast<std::uint32_t*>(aligned + keys);
  rows_.masks = reinterpret_cast<std::uint32_t*>(aligned + masks);
  rows_.weights = reinterpret_cast<double*>(aligned + weights);
  rows_.sums = reinterpret_cast<double*>(aligned + sums);
  rows_.lanes = reinterpret_cast<double*>(aligned + lanes);
  rows_.integers = reinterpret_cast<std::uint32_t*>(aligned + integers);
  rules_.resize(num_models);
}

const SparseRun& SparseScratch::load_run(const Layer& layer, const MaskTable& masks, const Span& span, bool has_bits) {
  const std::size_t num_models = layer.num_models();
  bool any_ranked = false;
  for (std::size_t t = 0; t < num_models; ++t) {
    const std::size_t entry = span.tensor * num_models + t;
    auto* bits = reinterpret_cast<std::uint64_t*>(masks.bits[entry]);
    rules_[t] = {bits != nullptr && has_bits ? MaskKind::kBits : static_cast<MaskKind>(masks.kinds[entry]),
                 {masks.keys[2 * entry], masks.keys[2 * entry + 1]},
                 {masks.indices[2 * entry], masks.indices[2 * entry + 1]},
                 {masks.probabilities[2 * entry], masks.probabilities[2 * entry + 1]},
                 masks.streams[entry],
                 masks.values[entry],
                 bits == nullptr ? nullptr : bits + span.first / 64};
    any_ranked = any_ranked || rules_[t].kind == MaskKind::kRanked;
  }
  if (any_ranked) rank(layer, masks, span);
  run_ = {load(layer, span), num_models, span.first, span.numel, key_rule(masks.key, span.tensor), rules_.data()};
  return run_;
}

std::uint32_t* SparseScratch::key_buffer() {
  keys_.resize(kSpanNumel);
  return keys_.data();
}

// Ranks need whole rows: those that the item has parts of are read to their ends.
void SparseScratch::rank(const Layer& layer, const MaskTable& masks, const Span& span) {
  const KeyRule rule = key_rule(masks.key, span.tensor);
  const std::size_t loaded_first = span.first / rule.columns * rule.columns;
  const std::size_t loaded_end = (span.first + span.numel + rule.columns - 1) / rule.columns * rule.columns;
  const Operand* operands = whole_rows_.load(layer, {span.tensor, loaded_first, loaded_end - loaded_first});
  bits_.resize(rules_.size() * kBitsWords);
  const std::size_t row_numel = std::max(rule.columns, kChunkNumel);
  if (rank_limits_.size() < row_numel) {
    rank_keys_.resize(row_numel + 8);  // keys are written in wide steps
    rank_codes_.resize(row_numel);
    rank_limits_.resize(row_numel);
    rank_order_.resize(2 * row_numel + std::min(row_numel, kSpanNumel) + 1);
  }
  std::uint64_t* order = rank_order_.data();
  const RankScratch scratch{
      rank_keys_.data(), rank_codes_.data(), rank_limits_.data(), {order, order + row_numel}, order + 2 * row_numel};
  for (std::size_t t = 0; t < rules_.size(); ++t) {
    MaskRule& mask = rules_[t];
    if (mask.kind != MaskKind::kRanked) continue;
    if (mask.bits == nullptr) mask.bits = &bits_[t * kBitsWords];
    kernels().sparse.ranked(operands, rules_.size(), t, loaded_first, span.first, span.numel, rule, mask, rows_,
                            scratch, mask.bits);
    mask.kind = MaskKind::kBits;
  }
}

std::vector<SparseScratch> make_sparse_scratch(std::size_t num_operands, int num_workers) {
  std::vector<SparseScratch> scratch;
  scratch.reserve(static_cast<std::size_t>(num_workers));
  for (int worker = 0; worker < num_workers; ++worker) scratch.emplace_back(num_operands);
  return scratch;
}

}  // namespace metagpt_fast::cpu
