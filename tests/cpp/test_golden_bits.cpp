// The bits that the contract promises, as constants: every instruction set of every architecture has to reproduce them.
#include <bit>

#include "check.h"
#include "cpu/isa.h"
#include "cpu/layer_gram.h"
#include "cpu/layer_merge.h"
#include "oracle.h"

namespace metagpt_fast::test {
namespace {

constexpr std::uint64_t kGoldenGram = 0xfdf97fc93e5ddf01u;
constexpr std::uint64_t kGoldenMerge = 0xc2ac7f896442c0fdu;

// NaN payloads are not part of the contract.
std::uint64_t canonical_bits(double x) { return std::isnan(x) ? 0x7ff8000000000000u : std::bit_cast<std::uint64_t>(x); }

struct Hashes {
  std::uint64_t gram;
  std::uint64_t merge;
};

// Of what the kernels make of a few layers of every kind.
Hashes hash_results() {
  using enum DType;
  const std::vector<std::vector<DType>> patterns{{kBF16}, {kF16}, {kF32}, {kF64}, {kBF16, kF32, kF16}, {kF32, kF64}};
  Hash gram_hash;
  Hash merge_hash;
  Random random(42);
  std::uint64_t seed = 0;
  for (const std::vector<DType>& dtypes : patterns) {
    for (const Filling filling : {Filling::kWeights, Filling::kLarge, Filling::kTiny, Filling::kSpecial}) {
      for (const std::size_t num_models : {1, 3, 6}) {
        const std::size_t large = filling == Filling::kWeights && num_models == 3 ? 262144 + 5 : 9999;
        const OwnedLayer layer({37, 5000, large}, dtypes, num_models, num_models != 6, filling, ++seed);
        const std::size_t num_operands = layer.layer().num_operands;
        std::vector<double> gram(3 * num_operands * num_operands, 0.0);
        cpu::layer_gram(layer.layer(), gram.data());
        for (const double x : gram) gram_hash.add(canonical_bits(x));

        const std::vector<double> coefficients = some_coefficients(layer.layer(), random);
        for (const DType out_dtype : {kF32, kF16, kBF16, kF64}) {
          const OwnedOutput out(layer, out_dtype);
          std::int64_t num_nonfinite[3] = {};
          cpu::layer_merge(layer.layer(), coefficients.data(), out.output(), num_nonfinite);
          for (std::size_t k = 0; k < 3; ++k) {
            for (std::size_t e = 0; e < layer.numel(k); ++e) merge_hash.add(canonical_bits(out[k][e]));
          }
        }
      }
    }
  }
  return {gram_hash.value(), merge_hash.value()};
}

}  // namespace

void test_golden_bits(Checks& checks) {
  for (const std::string& isa : cpu::supported_isas()) {
    cpu::set_isa(isa);
    const Hashes hashes = hash_results();
    checks.check(hashes.gram == kGoldenGram, [&] {
      return describe(isa, ": layer_gram's bits hash to ", std::hex, hashes.gram, ", expected ", kGoldenGram);
    });
    checks.check(hashes.merge == kGoldenMerge, [&] {
      return describe(isa, ": layer_merge's bits hash to ", std::hex, hashes.merge, ", expected ", kGoldenMerge);
    });
  }
}

}  // namespace metagpt_fast::test
