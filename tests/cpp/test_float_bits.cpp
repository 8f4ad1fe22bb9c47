// Conversions: float_bits.h against exact arithmetic, and every instruction set's conversions against float_bits.h.
#include <array>
#include <bit>

#include "check.h"
#include "core/float_bits.h"
#include "cpu/isa.h"
#include "cpu/layer_merge.h"
#include "oracle.h"

namespace metagpt_fast::test {
namespace {

struct Half {
  const char* name;
  DType dtype;
  HalfFormat format;
  float (*widen)(std::uint16_t);
  std::uint16_t (*narrow)(float);
};
constexpr std::array kHalves{
    Half{"f16", DType::kF16, kF16Format, float_from_f16, f16_from_float},
    Half{"bf16", DType::kBF16, kBF16Format, float_from_bf16, bf16_from_float},
};

// Doubles on, between and beside the values of the format, and some far away.
std::vector<double> doubles_near(const Half& half) {
  std::vector<double> values{1e300, -1e300, 1e-300, 5e-324, std::numeric_limits<double>::infinity()};
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
    const double x = decode_half(static_cast<std::uint16_t>(bits), half.format);
    if (!std::isfinite(x)) continue;
    const double next = decode_half(static_cast<std::uint16_t>(bits + 1), half.format);
    const double middle = std::isfinite(next) ? x + (next - x) / 2 : x * (1 + std::ldexp(1.0, -12));
    for (const double near : {x, middle}) {
      values.push_back(near);
      values.push_back(std::nextafter(near, 1e300));
      values.push_back(std::nextafter(near, -1e300));
      values.push_back(std::nextafter(static_cast<float>(near), 1e30f));
      values.push_back(std::nextafter(static_cast<float>(near), -1e30f));
    }
  }
  return values;
}

void check_half(Checks& checks, const Half& half) {
  int num_wrong = 0;
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
    const auto pattern = static_cast<std::uint16_t>(bits);
    const double exact = decode_half(pattern, half.format);
    num_wrong += !same_value(half.widen(pattern), exact);
    num_wrong += std::isnan(exact) ? !std::isnan(half.widen(half.narrow(half.widen(pattern))))
                                   : half.narrow(half.widen(pattern)) != pattern;
  }
  checks.check(num_wrong == 0, [&] { return describe(half.name, ": ", num_wrong, " patterns do not survive"); });

  int num_wrong_single = 0;
  int num_wrong_double = 0;
  for (const double x : doubles_near(half)) {
    const auto single = static_cast<float>(x);
    num_wrong_single += !same_value(half.widen(half.narrow(single)), round_to_half(single, half.format));
    const float odd = float_from_double_to_odd(x);
    num_wrong_double += !same_value(half.widen(half.narrow(odd)), round_to_half(x, half.format));
  }
  checks.check(num_wrong_single == 0, [&] { return describe(half.name, ": ", num_wrong_single, " floats wrong"); });
  checks.check(num_wrong_double == 0, [&] { return describe(half.name, ": ", num_wrong_double, " doubles wrong"); });
}

// A merge of one model with coefficient 1 is a conversion.
template <class In>
void check_conversion(Checks& checks, const std::vector<In>& values, DType in_dtype, DType out_dtype) {
  OwnedLayer layer({values.size()}, {in_dtype}, 1, false, Filling::kWeights, 1);
  std::memcpy(layer.operand(0, 0).data(), values.data(), values.size() * sizeof(In));
  const double one = 1;
  for (const std::string& isa : cpu::supported_isas()) {
    cpu::set_isa(isa);
    const OwnedOutput out(layer, out_dtype);
    std::int64_t num_nonfinite = 0;
    cpu::layer_merge(layer.layer(), &one, out.output(), &num_nonfinite);
    int num_wrong = 0;
    for (std::size_t e = 0; e < values.size(); ++e) {
      num_wrong += !same_value(out[0][e], round_to(layer.operand(0, 0)[e], out_dtype));
    }
    checks.check(num_wrong == 0, [&] {
      return describe(isa, ": ", num_wrong, " of ", values.size(), " wrong from dtype ", static_cast<int>(in_dtype),
                      " to ", static_cast<int>(out_dtype));
    });
  }
}

}  // namespace

void test_float_bits(Checks& checks) {
  std::vector<std::uint16_t> patterns(0x10000);
  for (std::size_t i = 0; i < patterns.size(); ++i) patterns[i] = static_cast<std::uint16_t>(i);
  for (const Half& half : kHalves) {
    check_half(checks, half);
    const std::vector<double> doubles = doubles_near(half);
    const std::vector<float> singles(doubles.begin(), doubles.end());
    for (const DType out_dtype : {DType::kF32, DType::kF16, DType::kBF16, DType::kF64}) {
      check_conversion(checks, patterns, half.dtype, out_dtype);
      check_conversion(checks, singles, DType::kF32, out_dtype);
      check_conversion(checks, doubles, DType::kF64, out_dtype);
    }
  }
}

}  // namespace metagpt_fast::test
