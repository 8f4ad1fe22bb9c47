// Which instruction set the kernels use.
#pragma once

#include <string>
#include <vector>

#include "kernel_table.h"

namespace metagpt_fast::cpu {

// Names that this build and this processor support, slowest first: "scalar", "avx2", "avx512", "neon".
std::vector<std::string> supported_isas();

// The table in use: set_isa, else METAGPT_FAST_ISA, else the last of supported_isas().
// Throws std::invalid_argument if the variable names one that is not supported.
const KernelTable& kernels();

// "auto" returns to the default. Throws std::invalid_argument for a name that is not supported here.
void set_isa(const std::string& name);

}  // namespace metagpt_fast::cpu
