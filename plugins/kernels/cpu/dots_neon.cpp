// Compiled on AArch64, where Advanced SIMD is part of the baseline.
#include "dots.h"

#ifdef __aarch64__
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
constexpr DotKernels kDOTS = makeDots("neon");
}
const DotKernels* neonDotsTable() {
    return &kDOTS;
}
}  // namespace nmexport
#else
namespace nmexport {
const DotKernels* neonDotsTable() {
    return nullptr;
}
}  // namespace nmexport
#endif
