// The contract of the kernels in plain scalar code, written independently of them, and the layers to try it on.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "check.h"
#include "core/layer.h"

namespace metagpt_fast::test {

// A 16-bit format by its field widths.
struct HalfFormat {
  int num_mantissa_bits;
  int min_exponent;  // of the least normal number
  int max_exponent;
};
inline constexpr HalfFormat kF16Format{10, -14, 15};
inline constexpr HalfFormat kBF16Format{7, -126, 127};

inline double decode_half(std::uint16_t bits, HalfFormat format) {
  const double sign = bits >> 15 ? -1.0 : 1.0;
  const int mantissa = bits & ((1 << format.num_mantissa_bits) - 1);
  const int exponent_field = (bits & 0x7fff) >> format.num_mantissa_bits;
  const int exponent = exponent_field - format.max_exponent;
  if (exponent > format.max_exponent) {
    return mantissa != 0 ? std::numeric_limits<double>::quiet_NaN() : sign * std::numeric_limits<double>::infinity();
  }
  if (exponent_field == 0) return sign * std::ldexp(mantissa, format.min_exponent - format.num_mantissa_bits);
  return sign * std::ldexp((1 << format.num_mantissa_bits) + mantissa, exponent - format.num_mantissa_bits);
}

// The value of the format nearest to x, ties to even; as a double, which holds it exactly.
inline double round_to_half(double x, HalfFormat format) {
  if (!std::isfinite(x) || x == 0) return x;
  int exponent = 0;
  std::frexp(x, &exponent);  // |x| in [2^(exponent-1), 2^exponent)
  const int ulp_exponent = std::max(exponent - 1, format.min_exponent) - format.num_mantissa_bits;
  const double rounded = std::ldexp(std::nearbyint(std::ldexp(x, -ulp_exponent)), ulp_exponent);
  const double overflow = std::ldexp(1.0, format.max_exponent + 1);
  return std::abs(rounded) >= overflow ? std::copysign(std::numeric_limits<double>::infinity(), x) : rounded;
}

// x rounded once to the dtype, as a double.
inline double round_to(double x, DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return static_cast<float>(x);
    case DType::kF16:
      return round_to_half(x, kF16Format);
    case DType::kBF16:
      return round_to_half(x, kBF16Format);
    case DType::kF64:
      return x;
  }
  return 0;
}

inline double read_element(const std::byte* data, std::size_t index, DType dtype) {
  std::uint16_t half = 0;
  float single = 0;
  double value = 0;
  switch (dtype) {
    case DType::kF32:
      std::memcpy(&single, data + 4 * index, 4);
      return single;
    case DType::kF64:
      std::memcpy(&value, data + 8 * index, 8);
      return value;
    case DType::kF16:
    case DType::kBF16:
      std::memcpy(&half, data + 2 * index, 2);
      return decode_half(half, dtype == DType::kF16 ? kF16Format : kBF16Format);
  }
  return 0;
}

// Equal values with equal signs of zero, or both NaN.
inline bool same_value(double a, double b) {
  if (std::isnan(a) || std::isnan(b)) return std::isnan(a) && std::isnan(b);
  return a == b && std::signbit(a) == std::signbit(b);
}

// Elements whose memory ends where the allocation ends, so that AddressSanitizer sees any byte beyond.
class Buffer {
 public:
  Buffer(DType dtype, std::size_t numel, std::size_t misalignment)
      : dtype_(dtype),
        numel_(numel),
        misalignment_(misalignment),
        memory_(std::make_unique<std::byte[]>(misalignment + numel * itemsize(dtype))) {}
  std::byte* data() const { return memory_.get() + misalignment_; }
  std::uint64_t address() const { return reinterpret_cast<std::uint64_t>(data()); }
  DType dtype() const { return dtype_; }
  std::size_t numel() const { return numel_; }
  std::size_t nbytes() const { return numel_ * itemsize(dtype_); }
  double operator[](std::size_t index) const { return read_element(data(), index, dtype_); }

 private:
  DType dtype_;
  std::size_t numel_;
  std::size_t misalignment_;
  std::unique_ptr<std::byte[]> memory_;
};

// What a tensor is filled with. Weights: fine-tunes near a base, all exact in every dtype but for rounding.
// Large and tiny: squares leave the range of fp32. Special: any bit pattern, so NaN, Inf and subnormals among them.
enum class Filling { kWeights, kLarge, kTiny, kSpecial };

void fill(Buffer& buffer, Filling filling, Random& random);

// A layer that owns its memory: operand i of every tensor has dtypes[i % size].
class OwnedLayer {
 public:
  OwnedLayer(std::vector<std::size_t> numels, std::vector<DType> dtypes, std::size_t num_models, bool has_base,
             Filling filling, std::uint64_t seed);
  const Layer& layer() const { return layer_; }
  const Buffer& operand(std::size_t tensor, std::size_t index) const {
    return operands_[tensor * layer_.num_operands + index];
  }
  Buffer& operand(std::size_t tensor, std::size_t index) { return operands_[tensor * layer_.num_operands + index]; }
  std::size_t numel(std::size_t tensor) const { return operand(tensor, 0).numel(); }
  std::string description() const;

  std::vector<std::uint64_t> addresses;
  std::vector<std::int32_t> files;

 private:
  std::vector<Buffer> operands_;
  std::vector<std::uint8_t> dtypes_;
  std::vector<std::int64_t> numels_;
  Layer layer_;
};

// Outputs of a merge, each of its own dtype and misalignment, and the tables that describe them.
class OwnedOutput {
 public:
  OwnedOutput(const OwnedLayer& layer, DType dtype);
  const LayerOutput& output() const { return output_; }
  const Buffer& operator[](std::size_t tensor) const { return buffers_[tensor]; }
  bool same_bytes(const OwnedOutput& other) const;

  std::vector<std::uint64_t> addresses;
  std::vector<std::int32_t> files;

 private:
  std::vector<Buffer> buffers_;
  std::vector<std::uint8_t> dtypes_;
  LayerOutput output_;
};

// gram[i, j] of one tensor in fp64 throughout.
std::vector<double> oracle_gram(const OwnedLayer& layer, std::size_t tensor);

// Element `index` of the merge of one tensor, as a double.
double oracle_merge(const OwnedLayer& layer, std::size_t tensor, std::size_t index, const double* coefficients,
                    DType out_dtype);

// Coefficients [K, T] that are not exact in fp32, some negative, zero or above one.
std::vector<double> some_coefficients(const Layer& layer, Random& random);

}  // namespace metagpt_fast::test
