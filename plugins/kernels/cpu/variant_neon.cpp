// Compiled on AArch64, where Advanced SIMD is part of the baseline.
#include "variant.h"

#ifdef __aarch64__
// The parts of a variant: each needs those before it.
// clang-format off
#include "simd_neon.h"
#include "select.inl"
#include "token.inl"
#include "product.inl"
#include "read.inl"
#include "step.inl"
#include "table.inl"
// clang-format on

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
