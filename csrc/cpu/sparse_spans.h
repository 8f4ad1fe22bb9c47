// What the kernels of sparse methods share: rules out of tables, and the scratch memory of a thread.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "../core/layer.h"
#include "../core/sparse.h"
#include "spans.h"

namespace metagpt_fast::cpu {

// Throws std::invalid_argument for a layer without base, an unknown kind, or columns that do not divide a tensor where
// rows are needed.
void check_keys(const Layer& layer, const KeyTable& keys);
void check_masks(const Layer& layer, const MaskTable& masks);

KeyRule key_rule(const KeyTable& keys, std::size_t tensor);

// J, the number of keys that an element has: 1 where the models share it, else T.
inline std::size_t num_keys(const Layer& layer, const KeyTable& keys) {
  return keys.kind == static_cast<int>(KeyKind::kVariance) ? 1 : layer.num_models();
}

// What one thread needs for kernels of sparse methods.
class SparseScratch {
 public:
  explicit SparseScratch(std::size_t num_operands);

  // The item's operands as memory. Throws FileOperandError.
  const Operand* load(const Layer& layer, const Span& span) { return operands_.load(layer, span); }

  // The item with operands and masks; valid until the next call. `has_bits`: whether the table's bits are known
  // already, else they will be written. Throws FileOperandError.
  const SparseRun& load_run(const Layer& layer, const MaskTable& masks, const Span& span, bool has_bits);

  const SparseRows& rows() const { return rows_; }
  // Room for the keys of one item.
  std::uint32_t* key_buffer();
  std::byte* output_buffer(std::size_t nbytes) { return operands_.output_buffer(nbytes); }

 private:
  void rank(const Layer& layer, const MaskTable& masks, const Span& span);

  ThreadScratch operands_;
  ThreadScratch whole_rows_;  // operands of the rows that an item has parts of
  std::unique_ptr<std::byte[]> memory_;
  SparseRows rows_;
  SparseRun run_;
  std::vector<MaskRule> rules_;
  std::vector<std::uint64_t> bits_;
  std::vector<std::uint32_t> keys_;
  std::vector<std::uint32_t> rank_keys_;
  std::vector<std::uint16_t> rank_codes_;
  std::vector<std::uint32_t> rank_limits_;
  std::vector<std::uint64_t> rank_order_;
};

// One scratch for every worker of a parallel_for.
std::vector<SparseScratch> make_sparse_scratch(std::size_t num_operands, int num_workers);

}  // namespace metagpt_fast::cpu
