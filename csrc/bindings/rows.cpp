#include "rows.h"

#include "../cpu/layer_row_divergence.h"
#include "../cpu/per_column.h"
#include "gil_release.h"
#include "tables.h"
#include "written.h"

namespace metagpt_fast {
namespace {

void layer_row_divergence(const Table<std::uint64_t>& addresses, const Table<std::int32_t>& files,
                          const Table<std::uint8_t>& dtypes, const Table<std::int64_t>& numels,
                          const Table<std::int64_t>& columns, const Table<std::uint64_t>& divergences) {
  const Layer layer = make_layer(addresses, files, dtypes, numels, true);
  check_shape("columns", columns, {addresses.shape(0)});
  check_shape("divergences", divergences, {addresses.shape(0)});
  const GilRelease release;
  cpu::layer_row_divergence(layer, columns.data(), divergences.data());
}

void column_gram(const Table<std::uint64_t>& addresses, const Table<std::int32_t>& files,
                 const Table<std::uint8_t>& dtypes, const Table<std::int64_t>& numels, bool has_base,
                 const Table<std::int64_t>& columns, const Table<std::uint64_t>& grams) {
  const Layer layer = make_layer(addresses, files, dtypes, numels, has_base);
  check_shape("columns", columns, {addresses.shape(0)});
  check_shape("grams", grams, {addresses.shape(0)});
  const GilRelease release;
  cpu::column_gram(layer, columns.data(), grams.data());
}

py::tuple column_merge(const Table<std::uint64_t>& addresses, const Table<std::int32_t>& files,
                       const Table<std::uint8_t>& dtypes, const Table<std::int64_t>& numels, bool has_base,
                       const Table<std::int64_t>& columns, const Table<std::uint64_t>& coefficients,
                       const Table<std::uint64_t>& out_addresses, const Table<std::int32_t>& out_files,
                       const Table<std::uint8_t>& out_dtypes) {
  const Layer layer = make_layer(addresses, files, dtypes, numels, has_base);
  check_shape("columns", columns, {addresses.shape(0)});
  check_shape("coefficients", coefficients, {addresses.shape(0)});
  Written written(layer, out_addresses, out_files, out_dtypes);
  {
    const GilRelease release;
    cpu::column_merge(layer, columns.data(), coefficients.data(), written.out, written.num_nonfinite);
  }
  return written.arrays();
}

}  // namespace

void define_rows(py::module_& m) {
  m.def("layer_row_divergence", &layer_row_divergence, py::arg("addresses").noconvert(), py::arg("files").noconvert(),
        py::arg("dtypes").noconvert(), py::arg("numels").noconvert(), py::arg("columns").noconvert(),
        py::arg("divergences").noconvert());
  m.def("column_gram", &column_gram, py::arg("addresses").noconvert(), py::arg("files").noconvert(),
        py::arg("dtypes").noconvert(), py::arg("numels").noconvert(), py::arg("has_base"),
        py::arg("columns").noconvert(), py::arg("grams").noconvert());
  m.def("column_merge", &column_merge, py::arg("addresses").noconvert(), py::arg("files").noconvert(),
        py::arg("dtypes").noconvert(), py::arg("numels").noconvert(), py::arg("has_base"),
        py::arg("columns").noconvert(), py::arg("coefficients").noconvert(), py::arg("out_addresses").noconvert(),
        py::arg("out_files").noconvert(), py::arg("out_dtypes").noconvert());
}

}  // namespace metagpt_fast
