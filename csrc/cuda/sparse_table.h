// What launches of sparse kernels take besides the layer's table: columns one after another in device memory, those of
// 8 bytes first. K pieces of tensors with T models each; docs/numerics.md has the rules.
#pragma once

#include "../core/sparse.h"
#include "layer_table.h"

namespace metagpt_fast::cuda {

// What elements are ranked by.
struct KeyColumns {
  KeyKind kind;
  const std::int64_t* firsts;        // [K] the first element of a piece, counted in its tensor
  const std::int64_t* columns;       // [K] elements per row
  const std::uint64_t* row_factors;  // [K] address of the tensor's factors by row, of importance
};

// Which elements of each task vector are kept.
struct MaskColumns {
  KeyColumns ranked_by;
  const std::int64_t* indices;         // [K, T, 2] of a band's ends
  const std::uint64_t* probabilities;  // [K, T, 2] in units of 2^-32
  const std::uint64_t* streams;        // [K, T] key of the random numbers
  const double* values;                // [K, T] of near masks
  const std::uint64_t* bits;           // [K, T] address of a bit per element, where masks are made before or are made
  const std::uint32_t* keys;           // [K, T, 2] of a band's ends
  const std::uint8_t* kinds;           // [K, T] MaskKind; kRanked and kBits where bits are written and read
};

// How what is kept is combined.
struct ElectionColumns {
  const double* scales;            // [K, T] factors of δ
  const double* votes;             // [K, T] factors of δ where the sign is elected
  const double* weights;           // [K, T] what the divisor adds up
  const double* uniques;           // [K, T] factor where one model alone counts
  const double* lambdas;           // [K] factor of all
  const double* floors;            // [K] least divisor, where positive
  const std::uint8_t* elects;      // [K]
  const std::uint8_t* normalizes;  // [K]
};

// Where the rows of pieces that are ranked, whole rows all of them, are sorted.
struct RankColumns {
  const std::int64_t* first_rows;  // [K + 1] rows before each piece
  const std::int64_t* starts;      // [K] items before each piece's, padded rows
};

inline KeyColumns key_columns_at(internal::Columns& columns, std::int64_t k, int key_kind) {
  KeyColumns keys{};
  keys.kind = static_cast<KeyKind>(key_kind);
  keys.firsts = columns.take<std::int64_t>(k);
  keys.columns = columns.take<std::int64_t>(k);
  keys.row_factors = columns.take<std::uint64_t>(k);
  return keys;
}

inline MaskColumns mask_columns_at(std::uint64_t address, std::int64_t k, std::int64_t t, int key_kind) {
  internal::Columns columns(address);
  MaskColumns masks{};
  masks.ranked_by = key_columns_at(columns, k, key_kind);
  masks.indices = columns.take<std::int64_t>(2 * k * t);
  masks.probabilities = columns.take<std::uint64_t>(2 * k * t);
  masks.streams = columns.take<std::uint64_t>(k * t);
  masks.values = columns.take<double>(k * t);
  masks.bits = columns.take<std::uint64_t>(k * t);
  masks.keys = columns.take<std::uint32_t>(2 * k * t);
  masks.kinds = columns.take<std::uint8_t>(k * t);
  return masks;
}

// The bits of keys that are looked for, [K, J, R], behind what the keys are.
struct WantedKeys {
  KeyColumns ranked_by;
  const std::uint32_t* bits;
  int num_keys;   // J
  int num_ranks;  // R
};

inline WantedKeys wanted_keys_at(std::uint64_t address, std::int64_t k, int key_kind, int num_keys, int num_ranks) {
  internal::Columns columns(address);
  WantedKeys wanted{};
  wanted.ranked_by = key_columns_at(columns, k, key_kind);
  wanted.bits = columns.take<std::uint32_t>(k * num_keys * num_ranks);
  wanted.num_keys = num_keys;
  wanted.num_ranks = num_ranks;
  return wanted;
}

inline ElectionColumns election_columns_at(std::uint64_t address, std::int64_t k, std::int64_t t) {
  internal::Columns columns(address);
  ElectionColumns election{};
  election.scales = columns.take<double>(k * t);
  election.votes = columns.take<double>(k * t);
  election.weights = columns.take<double>(k * t);
  election.uniques = columns.take<double>(k * t);
  election.lambdas = columns.take<double>(k);
  election.floors = columns.take<double>(k);
  election.elects = columns.take<std::uint8_t>(k);
  election.normalizes = columns.take<std::uint8_t>(k);
  return election;
}

inline RankColumns rank_columns_at(std::uint64_t address, std::int64_t k) {
  internal::Columns columns(address);
  RankColumns ranks{};
  ranks.first_rows = columns.take<std::int64_t>(k + 1);
  ranks.starts = columns.take<std::int64_t>(k);
  return ranks;
}

}  // namespace metagpt_fast::cuda
