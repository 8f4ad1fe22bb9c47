#pragma once

#include "../core/layer.h"
#include "../core/sparse.h"

namespace metagpt_fast::cpu {

// Keys and indices of the elements of given ranks, 0 being the largest key; among equal keys the lowest index comes
// first. ranks, keys, indices: [K, J, R], J = 1 for KeyKind::kVariance, else T. For rank −1: key 2^32 − 1, index −1.
// Exact. Throws FileOperandError, std::invalid_argument.
void layer_threshold(const Layer& layer, const KeyTable& table, const std::int64_t* ranks, std::size_t num_ranks,
                     std::uint32_t* keys, std::int64_t* indices);

// counts: [K, J] number of keys above 0. Throws FileOperandError, std::invalid_argument.
void layer_count_nonzero(const Layer& layer, const KeyTable& table, std::int64_t* counts);

}  // namespace metagpt_fast::cpu
