// What a launch takes: a layer whose tables lie in device memory, in one piece.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../core/dtype.h"

namespace metagpt_fast::cuda {

// The numerical contract's sizes (docs/numerics.md), as in csrc/cpu/kernel_table.h.
inline constexpr int kBlockNumel = 4096;
inline constexpr int kNumLanes = 16;
inline constexpr int kSpanBlocks = 64;

// Which kernel takes a tensor. The host decides (metagpt_fast/backends/launch_tables.py), for each launch.
enum Kind : std::uint8_t {
  kGeneral = 0,  // fp32, any mixture of dtypes
  kFp64 = 1,     // an operand, or the output of a merge, is F64
  kUniform = 2,  // kUniform + dtype: all operands are F32, F16 or BF16, and every address is a multiple of 16
};
inline constexpr int kNumKinds = 5;

// K tensors with V operands each, T of them models. Every address is a multiple of its dtype's size.
struct LayerTable {
  const std::uint64_t* addresses;      // [K, V]
  const std::uint64_t* out_addresses;  // [K]
  const std::int64_t* numels;          // [K]
  const std::int64_t* first_blocks;    // [K + 1] blocks before each tensor, Σ ceil(numel / kBlockNumel)
  const std::int64_t* first_spans;     // [K + 1] spans before each tensor
  const std::int64_t* rows;            // [K] where a tensor's Gram matrix, or its count, is
  const double* coefficients;          // [K, T]
  const std::uint8_t* dtypes;          // [K, V] DType
  const std::uint8_t* out_dtypes;      // [K] DType
  const std::uint8_t* kinds;           // [K] Kind
  std::int64_t num_tensors;
  int num_operands;
  bool has_base;
};

namespace internal {

// Takes columns off the front of device memory.
class Columns {
 public:
  explicit Columns(std::uint64_t address) : address_(address) {}
  template <class T>
  const T* take(std::int64_t count) {
    const auto* column = reinterpret_cast<const T*>(address_);
    address_ += static_cast<std::uint64_t>(count) * sizeof(T);
    return column;
  }

 private:
  std::uint64_t address_;
};

}  // namespace internal

// The table that lies at `address`, its columns one after another in the order of the struct.
inline LayerTable layer_table_at(std::uint64_t address, std::int64_t num_tensors, int num_operands, bool has_base) {
  const auto at = [&address](std::int64_t num_bytes) {
    const std::uint64_t here = address;
    address += static_cast<std::uint64_t>(num_bytes);
    return here;
  };
  const std::int64_t k = num_tensors;
  const std::int64_t v = num_operands;
  LayerTable table{};
  table.addresses = reinterpret_cast<const std::uint64_t*>(at(8 * k * v));
  table.out_addresses = reinterpret_cast<const std::uint64_t*>(at(8 * k));
  table.numels = reinterpret_cast<const std::int64_t*>(at(8 * k));
  table.first_blocks = reinterpret_cast<const std::int64_t*>(at(8 * (k + 1)));
  table.first_spans = reinterpret_cast<const std::int64_t*>(at(8 * (k + 1)));
  table.rows = reinterpret_cast<const std::int64_t*>(at(8 * k));
  table.coefficients = reinterpret_cast<const double*>(at(8 * k * (v - has_base)));
  table.dtypes = reinterpret_cast<const std::uint8_t*>(at(k * v));
  table.out_dtypes = reinterpret_cast<const std::uint8_t*>(at(k));
  table.kinds = reinterpret_cast<const std::uint8_t*>(at(k));
  table.num_tensors = num_tensors;
  table.num_operands = num_operands;
  table.has_base = has_base;
  return table;
}

}  // namespace metagpt_fast::cuda
