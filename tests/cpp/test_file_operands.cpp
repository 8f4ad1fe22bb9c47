// Operands read with pread and outputs written with pwrite: same bits as in memory, and errors that say which one.
#include <fcntl.h>
#include <unistd.h>

#include <array>
#include <cerrno>

#include "check.h"
#include "core/thread_pool.h"
#include "cpu/layer_gram.h"
#include "cpu/layer_merge.h"
#include "cpu/layer_nonfinite.h"
#include "oracle.h"
#include "temporary_file.h"

namespace metagpt_fast::test {
namespace {

// Moves every operand of odd index into the file, at offsets of no alignment. Returns the file's size.
std::uint64_t move_operands(OwnedLayer& layer, const TemporaryFile& file) {
  std::uint64_t offset = 3;
  for (std::size_t k = 0; k < layer.layer().num_tensors; ++k) {
    for (std::size_t i = 1; i < layer.layer().num_operands; i += 2) {
      const Buffer& operand = layer.operand(k, i);
      const std::size_t entry = k * layer.layer().num_operands + i;
      if (::pwrite(file.descriptor(), operand.data(), operand.nbytes(), static_cast<off_t>(offset)) !=
          static_cast<ssize_t>(operand.nbytes())) {
        throw std::runtime_error("cannot fill the temporary file");
      }
      layer.addresses[entry] = offset;
      layer.files[entry] = file.descriptor();
      offset += operand.nbytes();
    }
  }
  return offset;
}

void check_same_bits(Checks& checks, OwnedLayer& layer, DType out_dtype) {
  const std::size_t num_operands = layer.layer().num_operands;
  const std::size_t num_tensors = layer.layer().num_tensors;
  const std::vector<double> coefficients(num_tensors * layer.layer().num_models(), 0.3);
  std::vector<double> gram(num_tensors * num_operands * num_operands, 0.0);
  std::vector<double> gram_from_file = gram;
  std::vector<std::int64_t> num_nonfinite(num_tensors);
  std::vector<std::int64_t> counts(num_tensors * num_operands);
  std::vector<std::int64_t> first(num_tensors * num_operands);
  const OwnedOutput merged(layer, out_dtype);
  OwnedOutput merged_to_file(layer, out_dtype);
  cpu::layer_gram(layer.layer(), gram.data());
  cpu::layer_merge(layer.layer(), coefficients.data(), merged.output(), num_nonfinite.data());

  const TemporaryFile inputs;
  const TemporaryFile output;
  move_operands(layer, inputs);
  std::uint64_t offset = 5;
  for (std::size_t k = 0; k < num_tensors; ++k) {
    merged_to_file.addresses[k] = offset;
    merged_to_file.files[k] = output.descriptor();
    offset += merged_to_file[k].nbytes();
  }
  cpu::layer_gram(layer.layer(), gram_from_file.data());
  checks.check(gram == gram_from_file, [&] { return "layer_gram from a file: " + layer.description(); });
  cpu::layer_merge(layer.layer(), coefficients.data(), merged_to_file.output(), num_nonfinite.data());
  for (std::size_t k = 0; k < num_tensors; ++k) {
    const Buffer& buffer = merged_to_file[k];
    const auto position = static_cast<off_t>(merged_to_file.addresses[k]);
    const ssize_t done = ::pread(output.descriptor(), buffer.data(), buffer.nbytes(), position);
    checks.check(done == static_cast<ssize_t>(buffer.nbytes()), "the whole tensor is in the file");
  }
  checks.check(merged.same_bytes(merged_to_file), [&] { return "layer_merge by files: " + layer.description(); });
  cpu::layer_nonfinite(layer.layer(), counts.data(), first.data());
  checks.check(std::all_of(counts.begin(), counts.end(), [](std::int64_t n) { return n == 0; }), "nothing is NaN");
}

void check_errors(Checks& checks) {
  OwnedLayer layer({10, 300000}, {DType::kF32}, 3, true, Filling::kWeights, 2);
  std::vector<double> gram(2 * 16, 0.0);
  const TemporaryFile file;
  const std::uint64_t nbytes = move_operands(layer, file);
  const auto call_gram = [&] { cpu::layer_gram(layer.layer(), gram.data()); };

  if (::ftruncate(file.descriptor(), static_cast<off_t>(nbytes - 1)) != 0) checks.check(false, "ftruncate");
  checks.check_throws<FileOperandError>("a file that ends early", call_gram, [](const FileOperandError& error) {
    return error.error_number == 0 && error.tensor == 1 && error.operand == 3;
  });
  layer.files[1] = 1 << 20;
  checks.check_throws<FileOperandError>("no such descriptor", call_gram, [](const FileOperandError& error) {
    return error.error_number == EBADF && error.tensor == 0 && error.operand == 1;
  });

  const OwnedLayer in_memory({300000}, {DType::kBF16}, 1, true, Filling::kWeights, 3);
  OwnedOutput out(in_memory, DType::kBF16);
  const double coefficient = 0.5;
  std::int64_t num_nonfinite = 0;
  const auto call_merge = [&] { cpu::layer_merge(in_memory.layer(), &coefficient, out.output(), &num_nonfinite); };
  out.addresses[0] = 0;
  for (const auto& [path, mode, error_number] :
       {std::tuple{"/dev/null", O_RDONLY, EBADF}, std::tuple{"/dev/full", O_WRONLY, ENOSPC}}) {
    out.files[0] = ::open(path, mode);
    if (out.files[0] < 0) continue;  // not every system has /dev/full
    checks.check_throws<FileOperandError>(path, call_merge, [want = error_number](const FileOperandError& error) {
      return error.error_number == want && error.tensor == 0 && error.operand == -1;
    });
    ::close(out.files[0]);
  }
}

}  // namespace

void test_file_operands(Checks& checks) {
  using enum DType;
  const std::vector<std::vector<DType>> patterns{{kBF16}, {kF32}, {kF16, kF32}, {kF64, kBF16}};
  for (const std::vector<DType>& dtypes : patterns) {
    for (const std::size_t num_models : {2, 5}) {
      OwnedLayer layer({0, 1, 4097, 262144 + 99}, dtypes, num_models, num_models == 2, Filling::kWeights, 4);
      check_same_bits(checks, layer, dtypes[0]);
    }
  }
  check_errors(checks);
}

}  // namespace metagpt_fast::test
