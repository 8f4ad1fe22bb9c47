#pragma once

#include <pybind11/pybind11.h>

namespace metagpt_fast {

// The kernels of sparse methods.
void bind_sparse(pybind11::module_& m);

}  // namespace metagpt_fast
