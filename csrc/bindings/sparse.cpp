#include "sparse.h"

#include "../core/sparse.h"
#include "../cpu/layer_elect.h"
#include "../cpu/layer_moments.h"
#include "../cpu/layer_threshold.h"
#include "../cpu/sparse_spans.h"
#include "gil_release.h"
#include "tables.h"
#include "written.h"

namespace metagpt_fast {
namespace {

using Shape = std::vector<py::ssize_t>;

// Column `index` of a table that comes as a tuple of arrays. The tuple keeps the memory alive.
template <class T>
const T* column(const py::tuple& table, std::size_t index, const char* name, const Shape& shape) {
  if (index >= table.size() || !py::isinstance<Table<T>>(table[index])) {
    throw py::type_error(std::string(name) + ": expected a contiguous array of the column's dtype");
  }
  const auto array = py::reinterpret_borrow<Table<T>>(table[index]);
  check_shape(name, array, shape);
  return array.data();
}

KeyTable key_table(const Layer& layer, int kind, const Table<std::int64_t>& columns,
                   const Table<std::uint64_t>& row_factors) {
  const Shape tensors{static_cast<py::ssize_t>(layer.num_tensors)};
  check_shape("columns", columns, tensors);
  check_shape("row_factors", row_factors, tensors);
  return {kind, columns.data(), row_factors.data()};
}

MaskTable mask_table(const Layer& layer, const py::tuple& table) {
  const Shape tensors{static_cast<py::ssize_t>(layer.num_tensors)};
  const Shape models{tensors[0], static_cast<py::ssize_t>(layer.num_models())};
  const Shape ends{models[0], models[1], 2};
  if (table.size() != 10) throw py::value_error("masks: expected the ten fields of a MaskTable");
  MaskTable masks;
  masks.key.kind = table[0].cast<int>();
  masks.kinds = column<std::uint8_t>(table, 1, "masks.kinds", models);
  masks.keys = column<std::uint32_t>(table, 2, "masks.keys", ends);
  masks.indices = column<std::int64_t>(table, 3, "masks.indices", ends);
  masks.probabilities = column<std::uint64_t>(table, 4, "masks.probabilities", ends);
  masks.streams = column<std::uint64_t>(table, 5, "masks.streams", models);
  masks.values = column<double>(table, 6, "masks.values", models);
  masks.key.row_factors = column<std::uint64_t>(table, 7, "masks.row_factors", tensors);
  masks.key.columns = column<std::int64_t>(table, 8, "masks.columns", tensors);
  masks.bits = column<std::uint64_t>(table, 9, "masks.bits", models);
  return masks;
}

ElectionTable election_table(const Layer& layer, const py::tuple& table) {
  const Shape tensors{static_cast<py::ssize_t>(layer.num_tensors)};
  const Shape models{tensors[0], static_cast<py::ssize_t>(layer.num_models())};
  return {column<double>(table, 0, "election.scales", models),
          column<double>(table, 1, "election.votes", models),
          column<double>(table, 2, "election.weights", models),
          column<double>(table, 3, "election.uniques", models),
          column<double>(table, 4, "election.lambdas", tensors),
          column<double>(table, 5, "election.floors", tensors),
          column<std::uint8_t>(table, 6, "election.elects", tensors),
          column<std::uint8_t>(table, 7, "election.normalizes", tensors)};
}

py::tuple layer_threshold(const Table<std::uint64_t>& addresses, const Table<std::int32_t>& files,
                          const Table<std::uint8_t>& dtypes, const Table<std::int64_t>& numels,
                          const Table<std::int64_t>& columns, const Table<std::uint64_t>& row_factors, int key_kind,
                          const Table<std::int64_t>& ranks) {
  const Layer layer = make_layer(addresses, files, dtypes, numels, true);
  const KeyTable table = key_table(layer, key_kind, columns, row_factors);
  const auto num_keys = static_cast<py::ssize_t>(cpu::num_keys(layer, table));
  if (ranks.ndim() != 3) throw py::value_error("ranks: expected a table [K, J, R]");
  const Shape shape{addresses.shape(0), num_keys, ranks.shape(2)};
  check_shape("ranks", ranks, shape);
  py::array_t<std::uint32_t> keys(shape);
  py::array_t<std::int64_t> indices(shape);
  std::uint32_t* keys_data = keys.mutable_data();
  std::int64_t* indices_data = indices.mutable_data();
  {
    const GilRelease release;
    cpu::layer_threshold(layer, table, ranks.data(), static_cast<std::size_t>(shape[2]), keys_data, indices_data);
  }
  return py::make_tuple(keys, indices);
}

py::array_t<std::int64_t> layer_count_nonzero(const Table<std::uint64_t>& addresses, const Table<std::int32_t>& files,
                                              const Table<std::uint8_t>& dtypes, const Table<std::int64_t>& numels,
                                              const Table<std::int64_t>& columns,
                                              const Table<std::uint64_t>& row_factors, int key_kind) {
  const Layer layer = make_layer(addresses, files, dtypes, numels, true);
  const KeyTable table = key_table(layer, key_kind, columns, row_factors);
  py::array_t<std::int64_t> counts({addresses.shape(0), static_cast<py::ssize_t>(cpu::num_keys(layer, table))});
  std::int64_t* counts_data = counts.mutable_data();
  {
    const GilRelease release;
    cpu::layer_count_nonzero(layer, table, counts_data);
  }
  return counts;
}

py::array_t<double> layer_moments(const Table<std::uint64_t>& addresses, const Table<std::int32_t>& files,
                                  const Table<std::uint8_t>& dtypes, const Table<std::int64_t>& numels,
                                  const py::tuple& masks) {
  const Layer layer = make_layer(addresses, files, dtypes, numels, true);
  const MaskTable table = mask_table(layer, masks);
  py::array_t<double> moments({addresses.shape(0), addresses.shape(1) - 1, py::ssize_t{cpu::kNumMoments}});
  double* data = moments.mutable_data();
  {
    const GilRelease release;
    cpu::layer_moments(layer, table, data);
  }
  return moments;
}

py::tuple layer_elect(const Table<std::uint64_t>& addresses, const Table<std::int32_t>& files,
                      const Table<std::uint8_t>& dtypes, const Table<std::int64_t>& numels, const py::tuple& masks,
                      const py::tuple& election, const py::tuple& out) {
  const Layer layer = make_layer(addresses, files, dtypes, numels, true);
  const MaskTable table = mask_table(layer, masks);
  const ElectionTable rules = election_table(layer, election);
  const Shape tensors{addresses.shape(0)};
  Written written(
      layer, {column<std::uint64_t>(out, 0, "out.addresses", tensors),
              column<std::int32_t>(out, 1, "out.files", tensors), column<std::uint8_t>(out, 2, "out.dtypes", tensors)});
  {
    const GilRelease release;
    cpu::layer_elect(layer, table, rules, written.out, written.num_nonfinite);
  }
  return written.arrays();
}

}  // namespace

void bind_sparse(py::module_& m) {
  const auto addresses = py::arg("addresses").noconvert();
  const auto files = py::arg("files").noconvert();
  const auto dtypes = py::arg("dtypes").noconvert();
  const auto numels = py::arg("numels").noconvert();
  const auto columns = py::arg("columns").noconvert();
  const auto row_factors = py::arg("row_factors").noconvert();
  m.def("layer_threshold", &layer_threshold, addresses, files, dtypes, numels, columns, row_factors,
        py::arg("key_kind"), py::arg("ranks").noconvert());
  m.def("layer_count_nonzero", &layer_count_nonzero, addresses, files, dtypes, numels, columns, row_factors,
        py::arg("key_kind"));
  m.def("layer_moments", &layer_moments, addresses, files, dtypes, numels, py::arg("masks"));
  m.def("layer_elect", &layer_elect, addresses, files, dtypes, numels, py::arg("masks"), py::arg("election"),
        py::arg("out"));
}

}  // namespace metagpt_fast
