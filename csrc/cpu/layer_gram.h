#pragma once

#include "../core/layer.h"

namespace metagpt_fast::cpu {

// gram[k,i,j] += Σ_e v_i[e] v_j[e] for every tensor k;  v = [base, τ_0 ... τ_{T-1}] (or the models without a base)
// gram: [K, V, V] fp64 row-major, symmetric; added to, so that a tensor can be given in pieces. Pieces that are whole
// multiples of 64 blocks (262144 elements), in ascending order, give the bits of the whole tensor.
// Same bits for any number of threads and any instruction set. NaN and Inf follow IEEE.
// Throws FileOperandError, std::invalid_argument.
void layer_gram(const Layer& layer, double* gram);

}  // namespace metagpt_fast::cpu
