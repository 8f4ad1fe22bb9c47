#pragma once

#include "../core/layer.h"

namespace metagpt_fast::cpu {

// out = rne(fma(c_{T-1}, τ_{T-1}, ... fma(c_0, τ_0, base))) for every tensor; kernel_table.h has the formula in full.
// coefficients: [K, T] fp64 row-major. num_nonfinite: [K], set to the number of NaN and Inf written per tensor.
// Same bits for any number of threads and any instruction set, NaN payloads apart.
// Throws FileOperandError, std::invalid_argument.
void layer_merge(const Layer& layer, const double* coefficients, const LayerOutput& out, std::int64_t* num_nonfinite);

}  // namespace metagpt_fast::cpu
