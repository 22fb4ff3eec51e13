// Compiled with AVX2, FMA and F16C: dispatch.cpp asks the processor before anything here runs.
#include "variant.h"

#ifdef __AVX2__
// The parts of a variant: each needs those before it.
// clang-format off
#include "simd_avx2.h"
#include "select.inl"
#include "token.inl"
#include "product.inl"
#include "read.inl"
#include "step.inl"
#include "table.inl"
// clang-format on

namespace nmexport {
namespace {
constexpr Variant kVARIANT = makeVariant("avx2");
}
const Variant* avx2Table() {
    return &kVARIANT;
}
}  // namespace nmexport
#else
namespace nmexport {
const Variant* avx2Table() {
    return nullptr;
}
}  // namespace nmexport
#endif
