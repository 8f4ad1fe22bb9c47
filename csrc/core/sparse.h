// The tables of sparse methods: what is kept of each task vector, and how what is kept is combined. For K tensors with
// T models; row-major. docs/numerics.md has the rules.
#pragma once

#include <cstdint>

namespace metagpt_fast {

// What the elements of a tensor are ranked by: a key, the bits of a non-negative fp32.
enum class KeyKind : std::uint8_t { kMagnitude = 0, kVariance = 1, kImportance = 2 };
inline constexpr int kNumKeyKinds = 3;

enum class MaskKind : std::uint8_t { kAll = 0, kBand = 1, kRandom = 2, kRanked = 3, kNear = 4, kBits = 5 };
inline constexpr int kNumMaskKinds = 5;  // that a table may have: kBits is what kernels make of others

struct KeyTable {
  int kind = 0;                                // KeyKind
  const std::int64_t* columns = nullptr;       // [K] elements per row
  const std::uint64_t* row_factors = nullptr;  // [K] address of double [numel / columns], for kImportance
};

struct MaskTable {
  KeyTable key;
  const std::uint8_t* kinds = nullptr;           // [K, T] MaskKind
  const std::uint32_t* keys = nullptr;           // [K, T, 2] upper and lower end of a band
  const std::int64_t* indices = nullptr;         // [K, T, 2]
  const std::uint64_t* probabilities = nullptr;  // [K, T, 2] in units of 2^-32
  const std::uint64_t* streams = nullptr;        // [K, T] key of the random numbers
  const double* values = nullptr;                // [K, T]
  // [K, T] address of a bit per element, in words of 64, or 0: layer_moments writes there what is kept, layer_elect
  // reads it instead of finding it out again. Not for kAll and kNear.
  const std::uint64_t* bits = nullptr;
};

struct ElectionTable {
  const double* scales = nullptr;            // [K, T] factors of δ
  const double* votes = nullptr;             // [K, T] factors of δ where the sign is elected
  const double* weights = nullptr;           // [K, T] what the divisor adds up
  const double* uniques = nullptr;           // [K, T] factor where one model alone counts
  const double* lambdas = nullptr;           // [K] factor of all
  const double* floors = nullptr;            // [K] least divisor, where positive
  const std::uint8_t* elects = nullptr;      // [K]
  const std::uint8_t* normalizes = nullptr;  // [K]
};

}  // namespace metagpt_fast
