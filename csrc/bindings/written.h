// What the merging kernels return to Python: (int64 [K] NaN and Inf written, uint32 [K] CRC32C of what went to files).
#pragma once

#include "../core/layer.h"
#include "tables.h"

namespace metagpt_fast {

struct Written {
  Written(const Layer& layer, const LayerOutput& places)
      : num_nonfinite_array(static_cast<py::ssize_t>(layer.num_tensors)),
        crcs_array(static_cast<py::ssize_t>(layer.num_tensors)),
        out(places),
        num_nonfinite(num_nonfinite_array.mutable_data()) {
    out.crcs = crcs_array.mutable_data();
  }

  Written(const Layer& layer, const Table<std::uint64_t>& out_addresses, const Table<std::int32_t>& out_files,
          const Table<std::uint8_t>& out_dtypes)
      : Written(layer, LayerOutput{out_addresses.data(), out_files.data(), out_dtypes.data()}) {
    const auto num_tensors = static_cast<py::ssize_t>(layer.num_tensors);
    check_shape("out_addresses", out_addresses, {num_tensors});
    check_shape("out_files", out_files, {num_tensors});
    check_shape("out_dtypes", out_dtypes, {num_tensors});
  }

  py::tuple arrays() const { return py::make_tuple(num_nonfinite_array, crcs_array); }

  py::array_t<std::int64_t> num_nonfinite_array;
  py::array_t<std::uint32_t> crcs_array;
  // For the kernel, which runs without Python's lock.
  LayerOutput out;
  std::int64_t* num_nonfinite;  // [K]
};

}  // namespace metagpt_fast
