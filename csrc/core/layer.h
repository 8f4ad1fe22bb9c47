// What a kernel call takes: a layer, that is a list of tensors, each with the same number of operands.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "dtype.h"

namespace metagpt_fast {

// A list of K tensors with V operands each: [base, model_0 ... model_{T-1}], or the models alone.
// Tables are row-major [K, V]. Memory needs no alignment.
struct Layer {
  std::size_t num_tensors = 0;               // K
  std::size_t num_operands = 0;              // V >= 1
  bool has_base = true;                      // operand 0 is the base
  const std::uint64_t* addresses = nullptr;  // [K, V] address in memory, or byte offset in the file
  const std::int32_t* files = nullptr;       // [K, V] -1: memory; else an open file descriptor, read with pread
  const std::uint8_t* dtypes = nullptr;      // [K, V] DType
  const std::int64_t* numels = nullptr;      // [K] elements, 0 allowed

  std::size_t num_models() const { return num_operands - (has_base ? 1 : 0); }
};

// Where a merging kernel puts its K results, and the checksums of those that go to files.
struct LayerOutput {
  const std::uint64_t* addresses = nullptr;  // [K] address in memory, or byte offset in the file
  const std::int32_t* files = nullptr;       // [K] -1: memory; else an open file descriptor, written with pwrite
  const std::uint8_t* dtypes = nullptr;      // [K] DType
  std::uint32_t* crcs = nullptr;             // [K] set to the CRC32C of the bytes, 0 for memory; null: not wanted
};

// A read or write of a file operand failed. `error_number` is 0 where the file ended early.
struct FileOperandError : std::runtime_error {
  FileOperandError(const std::string& message, int errno_value, std::size_t tensor_index, int operand_index)
      : std::runtime_error(message), error_number(errno_value), tensor(tensor_index), operand(operand_index) {}
  int error_number;
  std::size_t tensor;  // index in the layer
  int operand;         // index of the operand, -1 for the output
};

// A kernel that reads its input more than once met other values than before: somebody writes to the file, or it was
// truncated.
struct InputChangedError : std::runtime_error {
  InputChangedError() : std::runtime_error("the input changed while it was read") {}
};

}  // namespace metagpt_fast
