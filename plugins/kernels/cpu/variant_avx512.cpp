// Compiled with AVX-512: dispatch.cpp asks the processor before anything here runs.
#include "variant.h"

#ifdef __AVX512F__
// The parts of a variant: each needs those before it.
// clang-format off
#include "simd_avx512.h"
#include "select.inl"
#include "token.inl"
#include "product.inl"
#include "read.inl"
#include "step.inl"
#include "table.inl"
// clang-format on

namespace nmexport {
namespace {
constexpr Variant kVARIANT = makeVariant("avx512");
}
const Variant* avx512Table() {
    return &kVARIANT;
}
}  // namespace nmexport
#else
namespace nmexport {
const Variant* avx512Table() {
    return nullptr;
}
}  // namespace nmexport
#endif
