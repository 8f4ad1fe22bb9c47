#pragma once

#include "../core/layer.h"

namespace metagpt_fast::cpu {

// divergences[k][r] = Σ_c p log(p / q) with p = softmax(model row r) + 1e-8 and q = softmax(base row r) + 1e-8, in
// fp64. The layer has two operands, base and model. columns: [K] elements of a row of tensor k. divergences: [K]
// addresses of fp64 [numel / columns]. Same bits for any number of threads and any instruction set, NaN payloads apart.
// A NaN or +Inf in either row, or a row of −Inf, gives NaN. Scratch per thread: 0.5 MiB, and, for file operands, a
// span. Throws FileOperandError, std::invalid_argument.
void layer_row_divergence(const Layer& layer, const std::int64_t* columns, const std::uint64_t* divergences);

}  // namespace metagpt_fast::cpu
