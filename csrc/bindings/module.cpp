// metagpt_fast._core: the kernels behind tables of addresses. Checks shapes and dtypes of the tables, not addresses:
// the callers are metagpt_fast's own modules.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "../core/layer.h"
#include "../core/mapped_files.h"
#include "../core/thread_pool.h"
#include "../cpu/bandwidth.h"
#include "../cpu/isa.h"
#include "../cpu/layer_gram.h"
#include "../cpu/layer_merge.h"
#include "../cpu/layer_nonfinite.h"
#include "../cpu/spans.h"
#include "checksums.h"
#include "dlpack.h"
#include "gil_release.h"
#include "rows.h"
#include "sparse.h"
#include "tables.h"
#include "written.h"

using namespace metagpt_fast;

namespace {

void layer_gram(const Table<std::uint64_t>& addresses, const Table<std::int32_t>& files,
                const Table<std::uint8_t>& dtypes, const Table<std::int64_t>& numels, bool has_base,
                Table<double>& gram) {
  const Layer layer = make_layer(addresses, files, dtypes, numels, has_base);
  check_shape("gram", gram, {addresses.shape(0), addresses.shape(1), addresses.shape(1)});
  double* sums = gram.mutable_data();
  const GilRelease release;
  cpu::layer_gram(layer, sums);
}

py::tuple layer_merge(const Table<std::uint64_t>& addresses, const Table<std::int32_t>& files,
                      const Table<std::uint8_t>& dtypes, const Table<std::int64_t>& numels, bool has_base,
                      const Table<double>& coefficients, const Table<std::uint64_t>& out_addresses,
                      const Table<std::int32_t>& out_files, const Table<std::uint8_t>& out_dtypes) {
  const Layer layer = make_layer(addresses, files, dtypes, numels, has_base);
  check_shape("coefficients", coefficients, {addresses.shape(0), static_cast<py::ssize_t>(layer.num_models())});
  Written written(layer, out_addresses, out_files, out_dtypes);
  {
    const GilRelease release;
    cpu::layer_merge(layer, coefficients.data(), written.out, written.num_nonfinite);
  }
  return written.arrays();
}

py::tuple layer_nonfinite(const Table<std::uint64_t>& addresses, const Table<std::int32_t>& files,
                          const Table<std::uint8_t>& dtypes, const Table<std::int64_t>& numels, bool has_base) {
  const Layer layer = make_layer(addresses, files, dtypes, numels, has_base);
  py::array_t<std::int64_t> counts({addresses.shape(0), addresses.shape(1)});
  py::array_t<std::int64_t> first({addresses.shape(0), addresses.shape(1)});
  std::int64_t* counts_data = counts.mutable_data();
  std::int64_t* first_data = first.mutable_data();
  {
    const GilRelease release;
    cpu::layer_nonfinite(layer, counts_data, first_data);
  }
  return py::make_tuple(counts, first);
}

// (address, (type code, bits, lanes), shape, strides in elements or None, (device type, device index)) of a DLPack
// capsule. The capsule keeps the memory alive; it is left as it is, so that its own destructor releases it.
py::tuple inspect_dlpack(const py::capsule& capsule) {
  if (std::string(capsule.name()) != "dltensor") throw py::value_error("expected an unused DLPack capsule");
  const auto* tensor = static_cast<const dlpack::Tensor*>(capsule.get_pointer());
  py::tuple shape(tensor->ndim);
  for (std::int32_t i = 0; i < tensor->ndim; ++i) shape[static_cast<std::size_t>(i)] = tensor->shape[i];
  py::object strides = py::none();
  if (tensor->strides != nullptr) {
    py::tuple steps(tensor->ndim);
    for (std::int32_t i = 0; i < tensor->ndim; ++i) steps[static_cast<std::size_t>(i)] = tensor->strides[i];
    strides = steps;
  }
  return py::make_tuple(reinterpret_cast<std::uintptr_t>(tensor->data) + tensor->byte_offset,
                        py::make_tuple(tensor->dtype.code, tensor->dtype.bits, tensor->dtype.lanes), shape, strides,
                        py::make_tuple(tensor->device.type, tensor->device.index));
}

// FileOperandError is an OSError with two more attributes.
void raise_file_operand_error(const py::object& type, const FileOperandError& error) {
  const py::object instance = type(error.error_number, error.what());
  instance.attr("tensor") = error.tensor;
  instance.attr("operand") = error.operand;
  PyErr_SetObject(type.ptr(), instance.ptr());
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "The compiled kernels of metagpt_fast. metagpt_fast._native documents and re-exports them.";

  static py::handle file_operand_error =
      py::exception<FileOperandError>(m, "FileOperandError", PyExc_OSError).release();
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const FileOperandError& error) {
      raise_file_operand_error(py::reinterpret_borrow<py::object>(file_operand_error), error);
    }
  });

  py::register_exception<InputChangedError>(m, "InputChangedError", PyExc_RuntimeError);

  m.def("layer_gram", &layer_gram, py::arg("addresses").noconvert(), py::arg("files").noconvert(),
        py::arg("dtypes").noconvert(), py::arg("numels").noconvert(), py::arg("has_base"), py::arg("gram").noconvert());
  m.def("layer_merge", &layer_merge, py::arg("addresses").noconvert(), py::arg("files").noconvert(),
        py::arg("dtypes").noconvert(), py::arg("numels").noconvert(), py::arg("has_base"),
        py::arg("coefficients").noconvert(), py::arg("out_addresses").noconvert(), py::arg("out_files").noconvert(),
        py::arg("out_dtypes").noconvert());
  m.def("layer_nonfinite", &layer_nonfinite, py::arg("addresses").noconvert(), py::arg("files").noconvert(),
        py::arg("dtypes").noconvert(), py::arg("numels").noconvert(), py::arg("has_base"));
  define_rows(m);
  m.def(
      "bandwidth_read",
      [](std::uintptr_t address, std::size_t nbytes) {
        const GilRelease release;
        return cpu::bandwidth_read(reinterpret_cast<const std::byte*>(address), nbytes);
      },
      py::arg("address"), py::arg("nbytes"));
  m.def(
      "bandwidth_triad",
      [](std::uintptr_t a, std::uintptr_t b, std::uintptr_t c, std::size_t numel) {
        const GilRelease release;
        cpu::bandwidth_triad(reinterpret_cast<float*>(a), reinterpret_cast<const float*>(b),
                             reinterpret_cast<const float*>(c), numel);
      },
      py::arg("a"), py::arg("b"), py::arg("c"), py::arg("numel"));
  m.def("guard_mapping", &guard_mapping, py::arg("address"), py::arg("nbytes"));
  m.def("unguard_mapping", &unguard_mapping, py::arg("guard"));
  m.def("fault_offset", &fault_offset, py::arg("guard"));
  m.def("inspect_dlpack", &inspect_dlpack, py::arg("capsule"));
  m.def("supported_isas", &cpu::supported_isas);
  m.def("isa", [] { return std::string(cpu::kernels().isa); });
  m.def("set_isa", &cpu::set_isa, py::arg("name"));
  m.def("num_threads", &num_threads);
  m.def("set_num_threads", &set_num_threads, py::arg("num_threads"));
  bind_sparse(m);
  define_checksums(m);
  m.attr("SPAN_NUMEL") = cpu::kSpanNumel;
}
