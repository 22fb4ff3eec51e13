// Compiled with AVX-512 VNNI: dispatch.cpp asks the processor before anything here runs.
#include "dots.h"

#ifdef __AVX512VNNI__
// The parts: each needs those before it.
// clang-format off
#include "dot_avx512vnni.h"
#include "dot_steps.inl"
#include "row_dots.inl"
#include "tile_dots.inl"
#include "quantise.inl"
#include "dot_table.inl"
// clang-format on

namespace nmexport {
namespace {
constexpr DotKernels kDOTS = makeDots("avx512vnni");
}
const DotKernels* avx512VnniDotsTable() {
    return &kDOTS;
}
}  // namespace nmexport
#else
namespace nmexport {
const DotKernels* avx512VnniDotsTable() {
    return nullptr;
}
}  // namespace nmexport
#endif
