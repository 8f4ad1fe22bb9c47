#pragma once

#include "../core/layer.h"
#include "../core/sparse.h"

namespace metagpt_fast::cpu {

// out = base + λ · Σ (scale_t δ_t) m_t / Σ weight_t  over the models that count at the element; docs/numerics.md has
// the steps. num_nonfinite: [K], set to the number of NaN and Inf written per tensor. The output may be no operand's
// memory. Same bits for any number of threads and any instruction set, NaN payloads apart. Throws FileOperandError,
// std::invalid_argument.
void layer_elect(const Layer& layer, const MaskTable& masks, const ElectionTable& election, const LayerOutput& out,
                 std::int64_t* num_nonfinite);

}  // namespace metagpt_fast::cpu
