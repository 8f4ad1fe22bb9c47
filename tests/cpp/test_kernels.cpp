// layer_gram, layer_merge and layer_nonfinite on every instruction set of this machine, against a scalar oracle.
#include <algorithm>
#include <array>
#include <bit>
#include <stdexcept>

#include "check.h"
#include "core/thread_pool.h"
#include "cpu/isa.h"
#include "cpu/layer_gram.h"
#include "cpu/layer_merge.h"
#include "cpu/layer_nonfinite.h"
#include "oracle.h"

namespace metagpt_fast::test {
namespace {

using enum DType;

constexpr std::array kAllDTypes{kF32, kF16, kBF16, kF64};
// One dtype for all operands, then mixtures.
const std::vector<std::vector<DType>> kDTypePatterns{{kF32},        {kF16},       {kBF16},       {kF64},
                                                     {kBF16, kF32}, {kF32, kF16}, {kF16, kBF16}, {kBF16, kBF16, kF64}};
// Around the lanes (16), the chunk (512) and the block (4096) of the kernels.
const std::vector<std::size_t> kSmallNumels{1, 0, 15, 16, 17, 33, 511, 512, 513, 1025, 4095, 4096, 4097};
// Around the span (262144): what one thread takes at a time.
const std::vector<std::size_t> kLargeNumels{262143, 262145, 2 * 262144 + 4111};

constexpr double kUnitRoundoff = 0x1p-24;
// Two roundings of the differences and 256 of a lane's sum, each relative to Σ|v_i v_j| <= sqrt(G_ii G_jj).
constexpr double kGramBound = (2 + 256 + 4) * kUnitRoundoff * 1.01;
constexpr double kGramBoundF64 = 1e-12;

std::vector<double> call_gram(const Layer& layer) {
  std::vector<double> gram(layer.num_tensors * layer.num_operands * layer.num_operands, 0.0);
  cpu::layer_gram(layer, gram.data());
  return gram;
}

bool same_gram(const std::vector<double>& a, const std::vector<double>& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](double x, double y) {
    return (std::isnan(x) && std::isnan(y)) || std::bit_cast<std::uint64_t>(x) == std::bit_cast<std::uint64_t>(y);
  });
}

// Whether the layer's Gram matrices are within the bound of the oracle's, with NaN and Inf where it has them.
void check_gram(Checks& checks, const OwnedLayer& layer, const std::vector<double>& gram, double bound) {
  const std::size_t num_operands = layer.layer().num_operands;
  for (std::size_t k = 0; k < layer.layer().num_tensors; ++k) {
    const std::vector<double> expected = oracle_gram(layer, k);
    const double* got = &gram[k * num_operands * num_operands];
    bool passed = true;
    for (std::size_t i = 0; i < num_operands; ++i) {
      for (std::size_t j = 0; j < num_operands; ++j) {
        const double want = expected[i * num_operands + j];
        const double x = got[i * num_operands + j];
        const double scale = std::sqrt(expected[i * num_operands + i]) * std::sqrt(expected[j * num_operands + j]);
        const bool symmetric = same_value(x, got[j * num_operands + i]);
        passed = passed && symmetric && (std::isfinite(want) ? std::abs(x - want) <= bound * scale : !std::isfinite(x));
      }
    }
    checks.check(passed, [&] {
      return describe("layer_gram differs from the oracle: ", cpu::kernels().isa, ", ", layer.description(), ", numel ",
                      layer.numel(k), ": first entries ", got[0], " and ", expected[0]);
    });
  }
}

// Every instruction set and thread count gives the same bits; the first is compared with the oracle.
void check_gram_everywhere(Checks& checks, const OwnedLayer& layer, double bound) {
  std::vector<double> first;
  for (const std::string& isa : cpu::supported_isas()) {
    cpu::set_isa(isa);
    for (const int threads : {1, 3}) {
      set_num_threads(threads);
      const std::vector<double> gram = call_gram(layer.layer());
      if (first.empty()) {
        first = gram;
        check_gram(checks, layer, gram, bound);
      }
      checks.check(same_gram(first, gram), [&] {
        return describe("layer_gram: ", isa, " with ", threads, " threads has other bits: ", layer.description());
      });
    }
  }
}

void check_merge_everywhere(Checks& checks, const OwnedLayer& layer, DType out_dtype, std::uint64_t seed) {
  Random random(seed);
  const std::vector<double> coefficients = some_coefficients(layer.layer(), random);
  const std::size_t num_models = layer.layer().num_models();
  std::vector<std::vector<double>> expected(layer.layer().num_tensors);
  for (std::size_t k = 0; k < expected.size(); ++k) {
    for (std::size_t e = 0; e < layer.numel(k); ++e) {
      expected[k].push_back(oracle_merge(layer, k, e, &coefficients[k * num_models], out_dtype));
    }
  }
  for (const std::string& isa : cpu::supported_isas()) {
    cpu::set_isa(isa);
    for (const int threads : {2, 1}) {
      set_num_threads(threads);
      const OwnedOutput out(layer, out_dtype);
      std::vector<std::int64_t> num_nonfinite(expected.size(), -1);
      cpu::layer_merge(layer.layer(), coefficients.data(), out.output(), num_nonfinite.data());
      for (std::size_t k = 0; k < expected.size(); ++k) {
        std::size_t num_wrong = 0;
        std::int64_t want_nonfinite = 0;
        for (std::size_t e = 0; e < expected[k].size(); ++e) {
          num_wrong += !same_value(out[k][e], expected[k][e]);
          want_nonfinite += !std::isfinite(expected[k][e]);
        }
        checks.check(num_wrong == 0 && num_nonfinite[k] == want_nonfinite, [&] {
          return describe("layer_merge: ", isa, ", ", threads, " threads, ", layer.description(), ", output dtype ",
                          static_cast<int>(out_dtype), ", numel ", layer.numel(k), ": ", num_wrong, " differ; ",
                          num_nonfinite[k], " not finite, expected ", want_nonfinite);
        });
      }
    }
  }
}

// Calls body(layer, seed) for layers of every dtype pattern, number of models and filling, with and without a base.
template <class Body>
void for_each_layer(Body body) {
  std::uint64_t seed = 1;
  for (const std::vector<DType>& dtypes : kDTypePatterns) {
    for (std::size_t num_models = 1; num_models <= 9; ++num_models) {
      const bool has_base = (num_models + seed) % 3 != 0;
      body(OwnedLayer(kSmallNumels, dtypes, num_models, has_base, Filling::kWeights, seed), seed);
      ++seed;
    }
    for (const Filling filling : {Filling::kLarge, Filling::kTiny, Filling::kSpecial}) {
      for (const std::size_t num_models : {1, 3, 5}) {
        body(OwnedLayer({17, 700, 4099}, dtypes, num_models, seed % 2 == 0, filling, seed), seed);
        ++seed;
      }
    }
    const std::vector<std::size_t> numels{kLargeNumels[seed % kLargeNumels.size()]};
    body(OwnedLayer(numels, dtypes, 1 + seed % 5, true, Filling::kWeights, seed), seed);
    ++seed;
  }
}

}  // namespace

void test_layer_gram(Checks& checks) {
  for_each_layer([&](const OwnedLayer& layer, std::uint64_t) {
    bool in_fp64 = false;
    for (std::size_t i = 0; i < layer.layer().num_operands; ++i) in_fp64 |= layer.operand(0, i).dtype() == kF64;
    check_gram_everywhere(checks, layer, in_fp64 ? kGramBoundF64 : kGramBound);
  });

  // A tensor given in pieces of whole spans, in ascending order, gives the bits of the whole tensor.
  const OwnedLayer whole({3 * 262144 + 1000}, {kBF16}, 2, true, Filling::kWeights, 7);
  const std::vector<double> expected = call_gram(whole.layer());
  std::vector<double> gram(expected.size(), 0.0);
  for (const auto& [first, numel] : {std::pair{0, 262144}, {262144, 2 * 262144}, {3 * 262144, 1000}}) {
    std::vector<std::uint64_t> addresses = whole.addresses;
    for (std::uint64_t& address : addresses) address += static_cast<std::uint64_t>(first) * itemsize(kBF16);
    const std::int64_t piece_numel = numel;
    Layer piece = whole.layer();
    piece.addresses = addresses.data();
    piece.numels = &piece_numel;
    cpu::layer_gram(piece, gram.data());
  }
  checks.check(gram == expected, "layer_gram: pieces of a tensor give other bits than the whole");
}

void test_layer_merge(Checks& checks) {
  for_each_layer([&](const OwnedLayer& layer, std::uint64_t seed) {
    const DType first_dtype = layer.operand(0, 0).dtype();
    check_merge_everywhere(checks, layer, seed % 2 == 0 ? first_dtype : kAllDTypes[seed / 2 % 4], seed);
  });

  // The output may be an operand's own memory.
  for (const DType dtype : kAllDTypes) {
    for (const std::size_t num_models : {2, 6}) {
      OwnedLayer layer({5001}, {dtype}, num_models, true, Filling::kWeights, 9);
      const std::vector<double> coefficients(num_models, 0.3);
      const OwnedOutput apart(layer, dtype);
      OwnedOutput in_place(layer, dtype);
      std::int64_t num_nonfinite = 0;
      cpu::layer_merge(layer.layer(), coefficients.data(), apart.output(), &num_nonfinite);
      in_place.addresses[0] = layer.operand(0, 1).address();
      cpu::layer_merge(layer.layer(), coefficients.data(), in_place.output(), &num_nonfinite);
      checks.check(std::memcmp(apart[0].data(), layer.operand(0, 1).data(), apart[0].nbytes()) == 0,
                   "layer_merge: other bits when the output is an operand");
    }
  }
}

void test_layer_nonfinite(Checks& checks) {
  for (const DType dtype : kAllDTypes) {
    for (const Filling filling : {Filling::kSpecial, Filling::kWeights}) {
      const OwnedLayer layer({0, 1, 300, 262144 + 5000}, {dtype, kF32}, 2, true, filling, 11);
      const std::size_t num_entries = 4 * 3;
      std::vector<std::int64_t> counts(num_entries, -7);
      std::vector<std::int64_t> first(num_entries, -7);
      set_num_threads(2);
      cpu::layer_nonfinite(layer.layer(), counts.data(), first.data());
      for (std::size_t entry = 0; entry < num_entries; ++entry) {
        const Buffer& operand = layer.operand(entry / 3, entry % 3);
        std::int64_t count = 0;
        std::int64_t index = -1;
        for (std::size_t e = operand.numel(); e-- > 0;) {
          if (std::isfinite(operand[e])) continue;
          ++count;
          index = static_cast<std::int64_t>(e);
        }
        checks.check(counts[entry] == count && first[entry] == index, [&] {
          return describe("layer_nonfinite: ", layer.description(), ", entry ", entry, ": got ", counts[entry],
                          " from ", first[entry], ", expected ", count, " from ", index);
        });
      }
    }
  }
}

void test_layer_arguments(Checks& checks) {
  const OwnedLayer owned({20}, {kF32}, 1, true, Filling::kWeights, 12);
  std::vector<double> gram(4, 0.0);
  std::int64_t num_nonfinite = 0;
  const double coefficient = 0.5;
  const OwnedOutput out(owned, kF32);

  Layer layer = owned.layer();
  const std::int64_t negative = -1;
  layer.numels = &negative;
  checks.check_throws<std::invalid_argument>("negative numel", [&] { cpu::layer_gram(layer, gram.data()); });
  layer = owned.layer();
  const std::array<std::uint8_t, 2> unknown{0, kNumDTypes};
  layer.dtypes = unknown.data();
  checks.check_throws<std::invalid_argument>("unknown dtype", [&] { cpu::layer_gram(layer, gram.data()); });
  LayerOutput output = out.output();
  output.dtypes = unknown.data() + 1;
  checks.check_throws<std::invalid_argument>(
      "unknown output dtype", [&] { cpu::layer_merge(owned.layer(), &coefficient, output, &num_nonfinite); });
  checks.check_throws<std::invalid_argument>("unknown ISA", [] { cpu::set_isa("sse2"); });
  checks.check_throws<std::invalid_argument>("negative threads", [] { set_num_threads(-1); });
  checks.check_throws<std::invalid_argument>("too many threads", [] { set_num_threads(1025); });
}

}  // namespace metagpt_fast::test
