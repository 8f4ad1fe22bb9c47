// What one instruction set provides for sparse methods, as kernel_table.h does for linear ones. docs/numerics.md has
// the contract.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../core/dtype.h"
#include "../core/sparse.h"

namespace metagpt_fast::cpu {

struct Operand;

// Words of bits for the elements of one work item.
inline constexpr std::size_t kBitsWords = 4096;

// The key of every NaN: above Inf's.
inline constexpr std::uint32_t kNanKey = 0x7fc00000u;

// What the elements of one tensor are ranked by.
struct KeyRule {
  KeyKind kind = KeyKind::kMagnitude;
  std::size_t columns = 1;
  const double* row_factors = nullptr;
};

// What is kept of one task vector.
struct MaskRule {
  MaskKind kind = MaskKind::kAll;
  std::uint32_t keys[2] = {};
  std::int64_t indices[2] = {};
  std::uint64_t probabilities[2] = {};
  std::uint64_t stream = 0;
  double value = 0;
  std::uint64_t* bits = nullptr;  // of the run: what kBits keeps; for other kinds what is kept is written there
};

// How the models of one tensor are combined.
struct ElectionRule {
  const double* scales;   // [T]
  const double* votes;    // [T]
  const double* weights;  // [T]
  const double* uniques;  // [T]
  double lambda;
  double floor;
  bool elects;
  bool normalizes;
};

// A run of elements of one tensor, and its masks. It begins at a multiple of kChunkNumel.
struct SparseRun {
  const Operand* operands = nullptr;  // [1 + T] base and models, from the run's first element on
  std::size_t num_models = 0;         // T
  std::size_t first = 0;              // element of the tensor
  std::size_t numel = 0;
  KeyRule key;
  const MaskRule* masks = nullptr;  // [T], none of kind kRanked
};

// Scratch memory of one thread: rows of kChunkNumel elements, 64-byte aligned.
struct SparseRows {
  std::byte* base = nullptr;          // fp32 or fp64
  std::byte* deltas = nullptr;        // [T] fp32 or fp64
  std::uint32_t* keys = nullptr;      // one row
  std::uint32_t* masks = nullptr;     // [T] all ones: kept
  double* weights = nullptr;          // [T] m of masks of kind kNear
  double* sums = nullptr;             // [kNumSumRows]
  double* lanes = nullptr;            // [T, 4, kNumLanes]
  std::uint32_t* integers = nullptr;  // two rows
  static constexpr std::size_t kNumSumRows = 4;
};

// Scratch memory of one thread for the ranks within a row: [columns] each, keys of kChunkNumel at least.
struct RankScratch {
  std::uint32_t* keys = nullptr;
  std::uint16_t* codes = nullptr;
  std::uint32_t* limits = nullptr;
  std::uint64_t* order[2] = {};
  std::uint64_t* pending = nullptr;  // no more than a work item has elements
};

// Columns of the moments.
inline constexpr std::size_t kNumMoments = 6;

// Where keys are, seen from a bracket: where its ends are equal, at_high has those that are equal to both.
struct KeyCounts {
  std::uint64_t above = 0;
  std::uint64_t at_high = 0;
  std::uint64_t between = 0;
  std::uint64_t at_low = 0;
};

inline constexpr std::size_t kScanSlack = 16;

struct SparseKernels {
  // keys[e] of elements [offset, offset + numel) of the operands, which are elements [first, ...) of the tensor.
  // `model` is ignored for kVariance.
  void (*keys)(const Operand* operands, std::size_t num_models, std::size_t model, std::size_t offset,
               std::size_t first, std::size_t numel, const KeyRule& rule, const SparseRows& rows, std::uint32_t* keys);

  // bits[e]: whether model `model` of kind kRanked keeps element e of [first, first + numel). The operands begin at
  // element loaded_first, and hold whole rows of the tensor.
  void (*ranked)(const Operand* operands, std::size_t num_models, std::size_t model, std::size_t loaded_first,
                 std::size_t first, std::size_t numel, const KeyRule& key, const MaskRule& mask, const SparseRows& rows,
                 const RankScratch& scratch, std::uint64_t* bits);

  // sums[t, :] = the six moments of the run: fp64, in kNumLanes lanes per block of kBlockNumel, blocks in order.
  void (*moments)(const SparseRun& run, const SparseRows& rows, double* sums);

  // Writes the combined elements of the run. Returns the number of NaN and Inf written.
  std::size_t (*elect)(const SparseRun& run, const ElectionRule& rule, const SparseRows& rows, std::byte* out,
                       DType out_dtype);

  // Counts keys[0 .. n) by a bracket, low <= high < 2^31. Where `found` is not null, the keys between the ends are
  // written to it; it has room for n + kScanSlack. Returns their number.
  std::size_t (*scan_keys)(const std::uint32_t* keys, std::size_t n, std::uint32_t low, std::uint32_t high,
                           KeyCounts& counts, std::uint32_t* found);
};

}  // namespace metagpt_fast::cpu
