// Compiled with AVX-512: nothing here may run before dispatch.cpp has asked the processor.
#include "variant.h"

#ifdef __AVX512F__
// The parts of a variant, in order of use.
#include "product.inl"
#include "select.inl"
#include "simd_avx512.h"
#include "table.inl"
#include "token.inl"

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
