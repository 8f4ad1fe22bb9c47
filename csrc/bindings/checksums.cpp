#include "checksums.h"

#include <algorithm>

#include "../core/crc32c.h"
#include "../core/file_checksums.h"
#include "gil_release.h"
#include "tables.h"

namespace metagpt_fast {
namespace {

std::uint32_t crc32c_of_buffer(const py::buffer& data) {
  const py::buffer_info info = data.request();
  if (PyBuffer_IsContiguous(info.view(), 'C') == 0) throw py::value_error("data: expected contiguous bytes");
  const auto* bytes = static_cast<const std::byte*>(info.ptr);
  const auto nbytes = static_cast<std::size_t>(info.size * info.itemsize);
  const GilRelease release;
  return crc32c(bytes, nbytes);
}

py::array_t<std::uint32_t> crc32c_of_memory(const Table<std::uint64_t>& addresses, const Table<std::int64_t>& nbytes) {
  const py::ssize_t num_runs = addresses.size();
  check_shape("addresses", addresses, {num_runs});
  check_shape("nbytes", nbytes, {num_runs});
  py::array_t<std::uint32_t> crcs(num_runs);
  std::uint32_t* results = crcs.mutable_data();
  {
    const GilRelease release;
    for (py::ssize_t i = 0; i < num_runs; ++i) {
      const auto* data = reinterpret_cast<const std::byte*>(addresses.data()[i]);
      results[i] = crc32c(data, static_cast<std::size_t>(nbytes.data()[i]));
    }
  }
  return crcs;
}

py::array_t<std::uint32_t> crc32c_of_file(int file, const Table<std::int64_t>& offsets,
                                          const Table<std::int64_t>& nbytes) {
  const py::ssize_t num_ranges = offsets.size();
  check_shape("offsets", offsets, {num_ranges});
  check_shape("nbytes", nbytes, {num_ranges});
  py::array_t<std::uint32_t> crcs(num_ranges);
  std::uint32_t* results = crcs.mutable_data();
  {
    const GilRelease release;
    file_crc32c(file, static_cast<std::size_t>(num_ranges), offsets.data(), nbytes.data(), results);
  }
  return crcs;
}

py::array_t<std::uint32_t> crc32c_join(const Table<std::uint32_t>& crcs, const Table<std::int64_t>& nbytes,
                                       const Table<std::int64_t>& owners, py::ssize_t num_owners) {
  const py::ssize_t num_parts = crcs.size();
  check_shape("crcs", crcs, {num_parts});
  check_shape("nbytes", nbytes, {num_parts});
  check_shape("owners", owners, {num_parts});
  py::array_t<std::uint32_t> joined(num_owners);
  std::fill_n(joined.mutable_data(), num_owners, 0u);
  Crc32cSequence sequence;
  for (py::ssize_t i = 0; i < num_parts; ++i) {
    const std::int64_t owner = owners.data()[i];
    if (owner < 0 || owner >= num_owners || nbytes.data()[i] < 0 || (i > 0 && owner < owners.data()[i - 1])) {
      throw py::value_error("owners: expected ascending numbers below num_owners, and sizes that are not negative");
    }
    if (i > 0 && owner != owners.data()[i - 1]) sequence.restart();
    sequence.append(crcs.data()[i], static_cast<std::uint64_t>(nbytes.data()[i]));
    joined.mutable_data()[owner] = sequence.value();
  }
  return joined;
}

}  // namespace

void define_checksums(py::module_& m) {
  m.def("crc32c", &crc32c_of_buffer, py::arg("data"));
  m.def("crc32c_of_memory", &crc32c_of_memory, py::arg("addresses").noconvert(), py::arg("nbytes").noconvert());
  m.def("crc32c_of_file", &crc32c_of_file, py::arg("file"), py::arg("offsets").noconvert(),
        py::arg("nbytes").noconvert());
  m.def("crc32c_join", &crc32c_join, py::arg("crcs").noconvert(), py::arg("nbytes").noconvert(),
        py::arg("owners").noconvert(), py::arg("num_owners"));
}

}  // namespace metagpt_fast
