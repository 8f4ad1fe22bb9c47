// The dtypes that the kernels take. The codes are those of metagpt_fast/dtypes.py.
#pragma once

#include <cstddef>
#include <cstdint>

namespace metagpt_fast {

enum class DType : std::uint8_t { kF32 = 0, kF16 = 1, kBF16 = 2, kF64 = 3 };

inline constexpr int kNumDTypes = 4;

constexpr std::size_t itemsize(DType dtype) {
  switch (dtype) {
    case DType::kF16:
    case DType::kBF16:
      return 2;
    case DType::kF32:
      return 4;
    case DType::kF64:
      return 8;
  }
  return 0;
}

}  // namespace metagpt_fast
