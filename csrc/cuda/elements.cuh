// Elements in device memory: widened on load, rounded once on store. The texts *.cuh use CUDA's own names and are
// compiled twice: by nvcc, and by the host's compiler with tests/cpp/cuda_emulation.h, which is how their arithmetic is
// tested where there is no GPU.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#include "device_primitives.cuh"
#else
#include "cuda_emulation.h"
#endif
#include "layer_table.h"

namespace metagpt_fast::cuda {

template <DType kDType>
inline constexpr int kItemsize = static_cast<int>(itemsize(kDType));

// The tensor that block (or span) `number` belongs to: the last one that begins at or before it.
__device__ inline std::int64_t tensor_of(const std::int64_t* firsts, std::int64_t num_tensors, std::int64_t number) {
  std::int64_t low = 0;
  for (std::int64_t high = num_tensors; high - low > 1;) {
    const std::int64_t middle = low + (high - low) / 2;
    (__ldg(firsts + middle) <= number ? low : high) = middle;
  }
  return low;
}

template <DType kDType>
__device__ inline float widen(std::uint16_t bits) {
  static_assert(kDType == DType::kF16 || kDType == DType::kBF16);
  if constexpr (kDType == DType::kBF16) return __uint_as_float(static_cast<std::uint32_t>(bits) << 16);
  return __half2float(__ushort_as_half(bits));
}

// Element e of an operand. Only fp64 arithmetic meets F64.
template <class Scalar>
__device__ inline Scalar load_element(std::uint64_t address, DType dtype, std::int64_t e) {
  switch (dtype) {
    case DType::kF32:
      return in_global<const float>(address)[e];
    case DType::kF16:
      return widen<DType::kF16>(in_global<const std::uint16_t>(address)[e]);
    case DType::kBF16:
      return widen<DType::kBF16>(in_global<const std::uint16_t>(address)[e]);
    case DType::kF64:
      return static_cast<Scalar>(in_global<const double>(address)[e]);
  }
  return 0;
}

// Element e of operand i of tensor k.
template <class Scalar>
__device__ __forceinline__ Scalar operand_at(const LayerTable& table, std::int64_t k, int i, std::int64_t e) {
  const std::int64_t place = k * table.num_operands + i;
  return load_element<Scalar>(__ldg(table.addresses + place), static_cast<DType>(__ldg(table.dtypes + place)), e);
}

// Rounds to odd, as core/float_bits.h does: rounding the result to 16 bits is then the one rounding of `value`.
__device__ inline float to_odd(double value) {
  const float nearest = static_cast<float>(value);
  const double back = static_cast<double>(nearest);
  if (back == value || value != value) return nearest;
  std::uint32_t bits = __float_as_uint(nearest);
  if (bits & 1u) return nearest;
  const bool too_large = (back > value) == !(bits >> 31);
  bits += too_large ? ~0u : 1u;
  return __uint_as_float(bits);
}
__device__ inline float to_odd(float value) { return value; }

__device__ inline std::uint16_t f16_bits(float value) { return __half_as_ushort(__float2half_rn(value)); }
__device__ inline std::uint16_t bf16_bits(float value) { return __bfloat16_as_ushort(__float2bfloat16_rn(value)); }

template <class Scalar>
__device__ inline void store_element(std::uint64_t address, DType dtype, std::int64_t e, Scalar value) {
  switch (dtype) {
    case DType::kF32:
      in_global<float>(address)[e] = static_cast<float>(value);
      return;
    case DType::kF16:
      in_global<std::uint16_t>(address)[e] = f16_bits(to_odd(value));
      return;
    case DType::kBF16:
      in_global<std::uint16_t>(address)[e] = bf16_bits(to_odd(value));
      return;
    case DType::kF64:
      in_global<double>(address)[e] = static_cast<double>(value);
      return;
  }
}

__device__ inline float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ inline double fused(double a, double b, double c) { return __fma_rn(a, b, c); }

}  // namespace metagpt_fast::cuda
