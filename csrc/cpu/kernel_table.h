// What one instruction set provides. Everything above this table is the same for all of them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../core/dtype.h"
#include "sparse_kernels.h"

namespace metagpt_fast::cpu {

// Elements whose products are summed in fp32 lanes before they go to fp64. Part of the numerical contract.
inline constexpr std::size_t kBlockNumel = 4096;
// Virtual lanes of a block: lane l sums the elements e with e % 16 == l, in ascending order, on every instruction
// set, so that all of them give the same bits.
inline constexpr std::size_t kNumLanes = 16;
// Elements converted at a time: (1 + T) chunks of fp32 stay in the L1 cache.
inline constexpr std::size_t kChunkNumel = 512;

// Elements of a work item (spans.h): 64 blocks. Fixed, because the order of fp64 additions follows from it: blocks
// within an item, then items. In bf16 with three models an item is 2 MiB of input, small enough to balance, large
// enough for pread.
inline constexpr std::size_t kSpanNumel = 64 * kBlockNumel;

struct Operand {
  const std::byte* data;  // [numel] dtype, unaligned
  DType dtype;
};

// Scratch memory of one thread, for layers of up to `num_operands` operands. 64-byte aligned parts.
struct Workspace {
  std::byte* values = nullptr;  // [V + 2, kChunkNumel] fp64 (or fp32, using half of it)
  std::byte* lanes = nullptr;   // [V, V, kNumLanes] fp64 (or fp32)
  double* sums = nullptr;       // [V, V] upper triangle of one block
};

// Added to both softmaxes of a divergence, as mergekit does.
inline constexpr double kSoftmaxEpsilon = 1e-8;

// The softmax of a row: exp(x − max) · scale.
struct Softmax {
  double max;
  double scale;        // 1 / Σ exp(x − max)
  const double* exps;  // exp(x − max), or null where they have to be computed again
};

struct KernelTable {
  const char* isa;

  // sums[i*V + j] += Σ_e v_i[e] v_j[e] for i <= j;  v_i = x_i − base (or x_i without a base; the base itself is v_0)
  // accumulator: fp32 in kNumLanes lanes per block of kBlockNumel, fp64 across blocks in order. A block whose squares
  // leave fp32's range, and every block of a tensor with an F64 operand, is summed in fp64 lanes.
  void (*gram_span)(const Operand* operands, std::size_t num_operands, bool has_base, std::size_t numel,
                    const Workspace& workspace, double* sums);

  // out[e] = rne(fma(c_{T-1}, x_{T-1}[e] − base[e], ... fma(c_0, x_0[e] − base[e], base[e])))
  // in fp32 with coefficients rounded to fp32, or all in fp64 if any operand or the output is F64. Without a base:
  // fma(c_{T-1}, x_{T-1}, ... fma(c_0, x_0, −0)). `out` may be an operand's own memory if the dtypes are the same.
  // Returns the number of NaN and Inf written.
  std::size_t (*merge_span)(const Operand* operands, std::size_t num_operands, bool has_base, std::size_t numel,
                            const double* coefficients, const Workspace& workspace, std::byte* out, DType out_dtype);

  // A row, or a part of it, in fp64. Sums: kNumLanes lanes per block of kBlockNumel, a tree, blocks in order.
  // row_exp_sum fills exps, [round_up(numel, 16)] or null. row_divergence takes base and model.
  double (*row_max)(Operand operand, std::size_t numel);  // NaN are passed over
  double (*row_exp_sum)(Operand operand, std::size_t numel, double max, double* exps);
  double (*row_divergence)(const Operand* operands, std::size_t numel, const Softmax* softmax);

  // sums[pair, c] = fma(v_i[r, c], v_j[r, c], sums[pair, c]), rows ascending, pairs i <= j, all in fp64. Operands are
  // at column 0 of row 0; their rows are row_stride elements apart.
  void (*column_gram_rows)(const Operand* operands, std::size_t num_operands, bool has_base, std::size_t rows,
                           std::size_t columns, std::size_t row_stride, const Workspace& workspace, double* sums);

  // merge_span with coefficients [columns, T]: those of element e are in row e % columns.
  std::size_t (*column_merge_span)(const Operand* operands, std::size_t num_operands, bool has_base, std::size_t numel,
                                   std::size_t columns, const double* coefficients, const Workspace& workspace,
                                   std::byte* out, DType out_dtype);
  SparseKernels sparse;
};

// Tables compiled into this build; null where the target processor family does not have the instruction set.
const KernelTable* scalar_kernels();
const KernelTable* avx2_kernels();
const KernelTable* avx512_kernels();
const KernelTable* neon_kernels();

}  // namespace metagpt_fast::cpu
