#pragma once

#include <pybind11/pybind11.h>

namespace metagpt_fast {

// Defines crc32c and what goes with it.
void define_checksums(pybind11::module_& m);

}  // namespace metagpt_fast
