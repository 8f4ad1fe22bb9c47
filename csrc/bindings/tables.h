// NumPy arrays as the tables that the kernels take.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "../core/layer.h"

namespace metagpt_fast {

namespace py = pybind11;

template <class T>
using Table = py::array_t<T, py::array::c_style>;

template <class T>
void check_shape(const char* name, const Table<T>& table, const std::vector<py::ssize_t>& shape) {
  bool same = table.ndim() == static_cast<py::ssize_t>(shape.size());
  for (std::size_t i = 0; same && i < shape.size(); ++i) same = table.shape(static_cast<py::ssize_t>(i)) == shape[i];
  if (!same) throw py::value_error(std::string(name) + ": the table's shape does not fit the layer's");
}

inline Layer make_layer(const Table<std::uint64_t>& addresses, const Table<std::int32_t>& files,
                        const Table<std::uint8_t>& dtypes, const Table<std::int64_t>& numels, bool has_base) {
  if (addresses.ndim() != 2) throw py::value_error("addresses: expected a table [K, V]");
  const py::ssize_t num_tensors = addresses.shape(0);
  const py::ssize_t num_operands = addresses.shape(1);
  if (num_operands < (has_base ? 2 : 1)) throw py::value_error("addresses: expected at least one model");
  check_shape("files", files, {num_tensors, num_operands});
  check_shape("dtypes", dtypes, {num_tensors, num_operands});
  check_shape("numels", numels, {num_tensors});
  Layer layer;
  layer.num_tensors = static_cast<std::size_t>(num_tensors);
  layer.num_operands = static_cast<std::size_t>(num_operands);
  layer.has_base = has_base;
  layer.addresses = addresses.data();
  layer.files = files.data();
  layer.dtypes = dtypes.data();
  layer.numels = numels.data();
  return layer;
}

}  // namespace metagpt_fast
