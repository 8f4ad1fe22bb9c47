#pragma once

#include "../core/layer.h"
#include "../core/sparse.h"

namespace metagpt_fast::cpu {

// moments[k, t, :] = number of elements kept (m > 0), Σ|δ|, Σ|δ|m, Σδ², Σ(δm)², number of elements that only model t
// keeps;  δ_t = model_t − base, in fp64 after one fp32 subtraction (fp64 if an operand is F64).
// moments: [K, T, 6] fp64 row-major. Same bits for any number of threads and any instruction set.
// Throws FileOperandError, std::invalid_argument.
void layer_moments(const Layer& layer, const MaskTable& masks, double* moments);

}  // namespace metagpt_fast::cpu
