// Compiled on AArch64, where Advanced SIMD is part of the baseline.
#include "variant.h"

#ifdef __aarch64__
// The parts of a variant, in order of use.
#include "product.inl"
#include "select.inl"
#include "simd_neon.h"
#include "table.inl"
#include "token.inl"

namespace nmexport {
namespace {
constexpr Variant kVARIANT = makeVariant("neon");
}
const Variant* neonTable() {
    return &kVARIANT;
}
}  // namespace nmexport
#else
namespace nmexport {
const Variant* neonTable() {
    return nullptr;
}
}  // namespace nmexport
#endif
