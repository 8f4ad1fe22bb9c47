// The kernels of sparse methods for one instruction set: texts that include nothing, in the order in which they need
// each other.
// clang-format off
#include "wide-inl.h"
#include "deltas-inl.h"
#include "philox-inl.h"
#include "masks-inl.h"
#include "ranks-inl.h"
#include "layer_moments-inl.h"
#include "layer_elect-inl.h"
#include "layer_threshold-inl.h"
// clang-format on

constexpr SparseKernels kSparseKernels{keys_span, ranked_span, moments_span, elect_span, scan_keys};
