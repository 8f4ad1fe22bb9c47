// Gram matrices and merges per column of tensors seen as [R, C].
#pragma once

#include "../core/layer.h"

namespace metagpt_fast::cpu {

// gram[c,i,j] += Σ_r v_i[r,c] v_j[r,c] for every column c of every tensor;  v as in layer_gram, everything in fp64.
// columns: [K] C of tensor k. grams: [K] addresses of fp64 [C, V, V]; added to. Pieces that are multiples of 256 rows,
// in ascending order, give the bits of the whole tensor. Same bits for any number of threads and any instruction set.
// Scratch per thread: two blocks of V (V + 1) / 2 sums of up to 8192 columns, and, for file operands, a span.
// Throws FileOperandError, std::invalid_argument.
void column_gram(const Layer& layer, const std::int64_t* columns, const std::uint64_t* grams);

// layer_merge with coefficients of their own for every column. coefficients: [K] addresses of fp64 [C, T].
void column_merge(const Layer& layer, const std::int64_t* columns, const std::uint64_t* coefficients,
                  const LayerOutput& out, std::int64_t* num_nonfinite);

}  // namespace metagpt_fast::cpu
