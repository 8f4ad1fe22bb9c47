// Task vectors, the keys that their elements are ranked by, and what masks keep of them, an element at a time. The bus
// brings elements more slowly than this takes them.
#pragma once

#include "elements.cuh"
#include "sparse_table.h"

namespace metagpt_fast::cuda {

inline constexpr std::uint32_t kNanKey = 0x7fc00000u;

__device__ __forceinline__ std::uint32_t key_of(float x) {
  const std::uint32_t bits = __float_as_uint(x) & 0x7fffffffu;
  return bits < kNanKey ? bits : kNanKey;
}

// T² times the population variance over the models, from differences to the first.
template <class Scalar>
__device__ __forceinline__ std::uint32_t variance_key(const LayerTable& table, std::int64_t k, std::int64_t e,
                                                      Scalar base) {
  const int num_models = table.num_operands - 1;
  const auto origin = static_cast<double>(operand_at<Scalar>(table, k, 1, e) - base);
  double sum = 0;
  double squares = 0;
  for (int t = 1; t < num_models; ++t) {
    const double difference = static_cast<double>(operand_at<Scalar>(table, k, 1 + t, e) - base) - origin;
    sum += difference;
    squares += difference * difference;
  }
  return key_of(static_cast<float>(static_cast<double>(num_models) * squares - sum * sum));
}

// What element e of a piece is ranked by in a model whose delta there is given.
template <class Scalar>
__device__ __forceinline__ std::uint32_t key_of_delta(const LayerTable& table, const KeyColumns& ranked_by,
                                                      std::int64_t k, std::int64_t e, Scalar base, Scalar delta) {
  switch (ranked_by.kind) {
    case KeyKind::kMagnitude:
      break;
    case KeyKind::kVariance:
      return variance_key<Scalar>(table, k, e, base);
    case KeyKind::kImportance: {
      const std::int64_t row = (__ldg(ranked_by.firsts + k) + e) / __ldg(ranked_by.columns + k);
      const double factor = in_global<const double>(__ldg(ranked_by.row_factors + k))[row];
      return key_of(static_cast<float>(static_cast<double>(delta) * factor));
    }
  }
  return key_of(static_cast<float>(delta));
}

// The same for model t.
template <class Scalar>
__device__ __forceinline__ std::uint32_t key_at(const LayerTable& table, const KeyColumns& ranked_by, std::int64_t k,
                                                int t, std::int64_t e) {
  const Scalar base = operand_at<Scalar>(table, k, 0, e);
  const Scalar delta = operand_at<Scalar>(table, k, 1 + t, e) - base;
  return key_of_delta<Scalar>(table, ranked_by, k, e, base, delta);
}

// The random number of an element: Philox4x32-10 (Salmon et al., SC 2011).
__device__ __forceinline__ std::uint32_t random_number(std::uint64_t stream, std::uint64_t element) {
  const std::uint64_t counter = element / 4;
  auto a = static_cast<std::uint32_t>(counter);
  auto b = static_cast<std::uint32_t>(counter >> 32);
  std::uint32_t c = 0, d = 0;
  auto low = static_cast<std::uint32_t>(stream);
  auto high = static_cast<std::uint32_t>(stream >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t first = std::uint64_t{0xd2511f53u} * a;
    const std::uint64_t second = std::uint64_t{0xcd9e8d57u} * c;
    a = static_cast<std::uint32_t>(second >> 32) ^ b ^ low;
    c = static_cast<std::uint32_t>(first >> 32) ^ d ^ high;
    b = static_cast<std::uint32_t>(second);
    d = static_cast<std::uint32_t>(first);
    low += 0x9e3779b9u;
    high += 0xbb67ae85u;
  }
  const auto word = static_cast<unsigned>(element % 4);
  return word < 2 ? (word == 0 ? a : b) : (word == 2 ? c : d);
}

__device__ __forceinline__ bool is_in_band(const MaskColumns& masks, std::int64_t rule, std::uint32_t key,
                                           std::int64_t index) {
  const std::uint32_t upper = __ldg(masks.keys + 2 * rule), lower = __ldg(masks.keys + 2 * rule + 1);
  const bool is_below = key < upper || (key == upper && index >= __ldg(masks.indices + 2 * rule));
  return is_below && (key > lower || (key == lower && index <= __ldg(masks.indices + 2 * rule + 1)));
}

// min(max(value / max(|δ|, 1e-6), 0), 1), where a NaN counts as small.
__device__ __forceinline__ double near_weight(double value, double delta) {
  const double magnitude = delta < 0 ? -delta : delta;
  const double ratio = value / (magnitude > 1e-6 ? magnitude : 1e-6);
  const double positive = ratio > 0 ? ratio : 0;
  return positive < 1 ? positive : 1;
}

// The mask of model t at element e of a piece, whose delta there is given: 0 where it is dropped, at most 1.
template <class Scalar>
__device__ __forceinline__ double mask_at(const LayerTable& table, const MaskColumns& masks, std::int64_t k, int t,
                                          std::int64_t e, Scalar base, Scalar delta) {
  const std::int64_t rule = k * (table.num_operands - 1) + t;
  switch (static_cast<MaskKind>(__ldg(masks.kinds + rule))) {
    case MaskKind::kBand: {
      const std::uint32_t key = key_of_delta<Scalar>(table, masks.ranked_by, k, e, base, delta);
      return is_in_band(masks, rule, key, __ldg(masks.ranked_by.firsts + k) + e) ? 1 : 0;
    }
    case MaskKind::kRandom: {
      const auto element = static_cast<std::uint64_t>(__ldg(masks.ranked_by.firsts + k) + e);
      return random_number(__ldg(masks.streams + rule), element) < __ldg(masks.probabilities + 2 * rule) ? 1 : 0;
    }
    case MaskKind::kNear:
      return near_weight(__ldg(masks.values + rule), static_cast<double>(delta));
    case MaskKind::kBits: {
      const std::uint8_t few = in_global<const std::uint8_t>(__ldg(masks.bits + rule))[e / 8];
      return static_cast<double>(few >> (e % 8) & 1);
    }
    case MaskKind::kAll:
    case MaskKind::kRanked:  // has become kBits
      return 1;
  }
  return 1;
}

}  // namespace metagpt_fast::cuda
