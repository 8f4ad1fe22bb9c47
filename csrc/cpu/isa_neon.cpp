#include "isa_prologue.h"

#if defined(__aarch64__)
#include <arm_neon.h>

namespace metagpt_fast::cpu {
namespace {
#include "vec_neon.h"
//
#include "vector_loops-inl.h"
//
#include "dot_products-inl.h"
#include "exp_log-inl.h"
#include "layer_gram-inl.h"
#include "layer_merge-inl.h"
#include "per_column-inl.h"
#include "row_divergence-inl.h"
//
#include "sparse_kernels-inl.h"

constexpr KernelTable kTable{"neon",         gram_span,        merge_span,        row_max,       row_exp_sum,
                             row_divergence, column_gram_rows, column_merge_span, kSparseKernels};
}  // namespace
}  // namespace metagpt_fast::cpu

const metagpt_fast::cpu::KernelTable* metagpt_fast::cpu::neon_kernels() { return &kTable; }
#else
const metagpt_fast::cpu::KernelTable* metagpt_fast::cpu::neon_kernels() { return nullptr; }
#endif
