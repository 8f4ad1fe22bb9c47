#include "isa_prologue.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,popcnt"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,popcnt")
#endif
namespace metagpt_fast::cpu {
namespace {
#include "vec_avx512.h"
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

constexpr KernelTable kTable{"avx512",       gram_span,        merge_span,        row_max,       row_exp_sum,
                             row_divergence, column_gram_rows, column_merge_span, kSparseKernels};
}  // namespace
}  // namespace metagpt_fast::cpu
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const metagpt_fast::cpu::KernelTable* metagpt_fast::cpu::avx512_kernels() { return &kTable; }
#else
const metagpt_fast::cpu::KernelTable* metagpt_fast::cpu::avx512_kernels() { return nullptr; }
#endif
