// Compiled with AVX2: dispatch.cpp asks the processor before anything here runs.
#include "dots.h"

#ifdef __AVX2__
// The parts: each needs those before it.
// clang-format off
#include "dot_avx2.h"
#include "dot_steps.inl"
#include "row_dots.inl"
#include "tile_dots.inl"
#include "quantise.inl"
#include "dot_table.inl"
// clang-format on

namespace nmexport {
namespace {
constexpr DotKernels kDOTS = makeDots("avx2");
}
const DotKernels* avx2DotsTable() {
    return &kDOTS;
}
}  // namespace nmexport
#else
namespace nmexport {
const DotKernels* avx2DotsTable() {
    return nullptr;
}
}  // namespace nmexport
#endif
