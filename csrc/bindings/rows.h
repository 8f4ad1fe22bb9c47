#pragma once

#include <pybind11/pybind11.h>

namespace metagpt_fast {

// Defines layer_row_divergence, column_gram and column_merge.
void define_rows(pybind11::module_& m);

}  // namespace metagpt_fast
