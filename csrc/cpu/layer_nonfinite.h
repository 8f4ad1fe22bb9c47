#pragma once

#include "../core/layer.h"

namespace metagpt_fast::cpu {

// Finds NaN and Inf, to say where they are once a Gram matrix has shown that there are some.
// counts[k,i]: how many elements of operand i of tensor k are NaN or Inf. first[k,i]: index of the first one, or -1.
// Both [K, V] row-major, overwritten. Throws FileOperandError, std::invalid_argument.
void layer_nonfinite(const Layer& layer, std::int64_t* counts, std::int64_t* first);

}  // namespace metagpt_fast::cpu
