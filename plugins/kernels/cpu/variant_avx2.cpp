// Compiled with AVX2, FMA and F16C: nothing here may run before dispatch.cpp has asked the
// processor.
#include "variant.h"

#ifdef __AVX2__
// The parts of a variant, in order of use.
#include "product.inl"
#include "select.inl"
#include "simd_avx2.h"
#include "table.inl"
#include "token.inl"

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
