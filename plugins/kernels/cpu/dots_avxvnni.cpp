// Compiled with AVX-VNNI: dispatch.cpp asks the processor before anything here runs.
#include "dots.h"

#ifdef __AVXVNNI__
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
constexpr DotKernels kDOTS = makeDots("avxvnni");
}
const DotKernels* avxVnniDotsTable() {
    return &kDOTS;
}
}  // namespace nmexport
#else
namespace nmexport {
const DotKernels* avxVnniDotsTable() {
    return nullptr;
}
}  // namespace nmexport
#endif
