// Compiled with the dot product of AArch64: dispatch.cpp asks the processor first.
#include "dots.h"

#ifdef __ARM_FEATURE_DOTPROD
// The parts: each needs those before it.
// clang-format off
#include "dot_neon.h"
#include "dot_steps.inl"
#include "row_dots.inl"
#include "tile_dots.inl"
#include "quantise.inl"
#include "dot_table.inl"
// clang-format on

namespace nmexport {
namespace {
constexpr DotKernels kDOTS = makeDots("neondot");
}
const DotKernels* neonDotProductTable() {
    return &kDOTS;
}
}  // namespace nmexport
#else
namespace nmexport {
const DotKernels* neonDotProductTable() {
    return nullptr;
}
}  // namespace nmexport
#endif
