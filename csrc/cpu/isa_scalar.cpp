#include "isa_prologue.h"

namespace metagpt_fast::cpu {
namespace {
#include "vec_scalar.h"
//
#include "layer_kernels-inl.h"

constexpr KernelTable kTable{"scalar", gram_span, merge_span};
}  // namespace

const KernelTable* scalar_kernels() { return &kTable; }

}  // namespace metagpt_fast::cpu
