// Included before the target region of every isa_<name>.cpp: all headers, so that none is compiled inside the region.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "../core/dtype.h"
#include "../core/float_bits.h"
#include "kernel_table.h"

#define MF_INLINE [[gnu::always_inline]] static inline
// Before a loop of few iterations over registers: GCC keeps arrays of them on the stack unless it unrolls early.
#define MF_UNROLL _Pragma("GCC unroll 4")
#define MF_NOINLINE [[gnu::noinline]] static

namespace metagpt_fast::cpu {

// Rounds fp64 values to a 16-bit dtype in one rounding. Rare (F64 inputs, 16-bit output), so it is scalar everywhere.
template <DType kDType>
inline void narrow_from_double(const double* values, std::size_t n, std::byte* out) {
  static_assert(kDType == DType::kBF16 || kDType == DType::kF16);
  for (std::size_t i = 0; i < n; ++i) {
    const float odd = float_from_double_to_odd(values[i]);
    const std::uint16_t bits = kDType == DType::kBF16 ? bf16_from_float(odd) : f16_from_float(odd);
    __builtin_memcpy(out + 2 * i, &bits, sizeof(bits));
  }
}

// Writes the keys whose bits are set to `out`, in order. Returns their number.
inline std::size_t pack_one_by_one(const std::uint32_t* keys, std::uint32_t bits, std::uint32_t* out) {
  std::size_t n = 0;
  for (; bits != 0; bits &= bits - 1) out[n++] = keys[__builtin_ctz(bits)];
  return n;
}

}  // namespace metagpt_fast::cpu
