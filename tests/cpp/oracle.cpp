#include "oracle.h"

#include <algorithm>
#include <array>
#include <bit>

#include "core/float_bits.h"

namespace metagpt_fast::test {
namespace {

std::uint64_t encode(double x, DType dtype) {
  const auto single = static_cast<float>(x);
  switch (dtype) {
    case DType::kF32:
      return std::bit_cast<std::uint32_t>(single);
    case DType::kF16:
      return f16_from_float(single);
    case DType::kBF16:
      return bf16_from_float(single);
    case DType::kF64:
      return std::bit_cast<std::uint64_t>(x);
  }
  return 0;
}

}  // namespace

void fill(Buffer& buffer, Filling filling, Random& random) {
  for (std::size_t e = 0; e < buffer.numel(); ++e) {
    std::uint64_t bits = random.bits();
    if (filling != Filling::kSpecial) {
      const double unit = static_cast<double>(static_cast<std::int64_t>(bits)) * 0x1p-63;  // in [-1, 1)
      const int exponent = filling == Filling::kWeights ? -5 : filling == Filling::kLarge ? 110 : -110;
      bits = encode(std::ldexp(unit, buffer.dtype() == DType::kF16 ? -5 : exponent), buffer.dtype());
    }
    std::memcpy(buffer.data() + e * itemsize(buffer.dtype()), &bits, itemsize(buffer.dtype()));
  }
}

OwnedLayer::OwnedLayer(std::vector<std::size_t> numels, std::vector<DType> dtypes, std::size_t num_models,
                       bool has_base, Filling filling, std::uint64_t seed) {
  Random random(seed);
  layer_.num_tensors = numels.size();
  layer_.num_operands = num_models + (has_base ? 1 : 0);
  layer_.has_base = has_base;
  for (std::size_t k = 0; k < numels.size(); ++k) {
    numels_.push_back(static_cast<std::int64_t>(numels[k]));
    for (std::size_t i = 0; i < layer_.num_operands; ++i) {
      const DType dtype = dtypes[i % dtypes.size()];
      Buffer& buffer = operands_.emplace_back(dtype, numels[k], (3 * k + 5 * i) % 17);
      fill(buffer, filling, random);
      dtypes_.push_back(static_cast<std::uint8_t>(dtype));
      addresses.push_back(buffer.address());
      files.push_back(-1);
    }
  }
  layer_.addresses = addresses.data();
  layer_.files = files.data();
  layer_.dtypes = dtypes_.data();
  layer_.numels = numels_.data();
}

std::string OwnedLayer::description() const {
  static constexpr std::array kNames{"F32", "F16", "BF16", "F64"};
  std::string text = layer_.has_base ? "base and models:" : "models:";
  for (std::size_t i = 0; i < layer_.num_operands; ++i) text += std::string(" ") + kNames.at(dtypes_[i]);
  return text;
}

OwnedOutput::OwnedOutput(const OwnedLayer& layer, DType dtype) {
  for (std::size_t k = 0; k < layer.layer().num_tensors; ++k) {
    Buffer& buffer = buffers_.emplace_back(dtype, layer.numel(k), (7 * k + 1) % 13);
    std::memset(buffer.data(), 0xa5, buffer.nbytes());
    addresses.push_back(buffer.address());
    files.push_back(-1);
    dtypes_.push_back(static_cast<std::uint8_t>(dtype));
  }
  output_ = {addresses.data(), files.data(), dtypes_.data()};
}

bool OwnedOutput::same_bytes(const OwnedOutput& other) const {
  return std::equal(buffers_.begin(), buffers_.end(), other.buffers_.begin(), other.buffers_.end(),
                    [](const Buffer& a, const Buffer& b) {
                      return a.nbytes() == b.nbytes() && std::memcmp(a.data(), b.data(), a.nbytes()) == 0;
                    });
}

std::vector<double> oracle_gram(const OwnedLayer& layer, std::size_t tensor) {
  const std::size_t num_operands = layer.layer().num_operands;
  std::vector<double> gram(num_operands * num_operands, 0.0);
  std::vector<double> v(num_operands);
  for (std::size_t e = 0; e < layer.numel(tensor); ++e) {
    for (std::size_t i = 0; i < num_operands; ++i) {
      v[i] = layer.operand(tensor, i)[e] - (layer.layer().has_base && i > 0 ? v[0] : 0.0);
    }
    for (std::size_t i = 0; i < num_operands; ++i) {
      for (std::size_t j = i; j < num_operands; ++j) gram[i * num_operands + j] += v[i] * v[j];
    }
  }
  for (std::size_t i = 0; i < num_operands; ++i) {
    for (std::size_t j = 0; j < i; ++j) gram[i * num_operands + j] = gram[j * num_operands + i];
  }
  return gram;
}

namespace {

template <class Scalar>
Scalar merge_element(const OwnedLayer& layer, std::size_t tensor, std::size_t index, const double* coefficients) {
  const bool has_base = layer.layer().has_base;
  const Scalar base = has_base ? static_cast<Scalar>(layer.operand(tensor, 0)[index]) : Scalar(0);
  Scalar sum = has_base ? base : -Scalar(0);
  for (std::size_t t = 0; t < layer.layer().num_models(); ++t) {
    const auto x = static_cast<Scalar>(layer.operand(tensor, t + (has_base ? 1 : 0))[index]);
    sum = std::fma(static_cast<Scalar>(coefficients[t]), x - base, sum);
  }
  return sum;
}

}  // namespace

double oracle_merge(const OwnedLayer& layer, std::size_t tensor, std::size_t index, const double* coefficients,
                    DType out_dtype) {
  bool in_fp64 = out_dtype == DType::kF64;
  for (std::size_t i = 0; i < layer.layer().num_operands; ++i) {
    in_fp64 = in_fp64 || layer.operand(tensor, i).dtype() == DType::kF64;
  }
  const double sum = in_fp64 ? merge_element<double>(layer, tensor, index, coefficients)
                             : merge_element<float>(layer, tensor, index, coefficients);
  return round_to(sum, out_dtype);
}

std::vector<double> some_coefficients(const Layer& layer, Random& random) {
  std::vector<double> coefficients(layer.num_tensors * layer.num_models());
  for (double& c : coefficients) c = static_cast<double>(static_cast<std::int64_t>(random.below(2000)) - 500) / 1013.0;
  return coefficients;
}

}  // namespace metagpt_fast::test
