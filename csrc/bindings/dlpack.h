// The part of the DLPack ABI that is needed to look at a tensor of another library (DLPack 0.x capsules, "dltensor").
#pragma once

#include <cstdint>

namespace metagpt_fast::dlpack {

struct Device {
  std::int32_t type;  // 1: CPU, 2: CUDA, 3: CUDA pinned, 10: ROCm
  std::int32_t index;
};

struct DataType {
  std::uint8_t code;  // 0: int, 1: uint, 2: IEEE float, 4: bfloat
  std::uint8_t bits;
  std::uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  std::int32_t ndim;
  DataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;  // in elements; null: row-major
  std::uint64_t byte_offset;
};

}  // namespace metagpt_fast::dlpack
