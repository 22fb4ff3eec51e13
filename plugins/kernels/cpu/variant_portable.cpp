// Compiled for the baseline of the architecture.
#include "variant.h"

// The parts of a variant: each needs those before it.
// clang-format off
#include "simd_portable.h"
#include "select.inl"
#include "token.inl"
#include "product.inl"
#include "read.inl"
#include "step.inl"
#include "table.inl"
// clang-format on

namespace nmexport {

const Variant& portableVariant() {
    static constexpr Variant kVARIANT = makeVariant("portable");
    return kVARIANT;
}

}  // namespace nmexport
