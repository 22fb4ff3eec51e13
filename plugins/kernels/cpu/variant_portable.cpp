// Compiled for the baseline of the architecture.
#include "variant.h"
// The parts of a variant, in order of use.
#include "simd_portable.h"
#include "select.inl"
#include "token.inl"
#include "product.inl"
#include "table.inl"

namespace nmexport {

const Variant& portableVariant() {
    static constexpr Variant kVARIANT = makeVariant("portable");
    return kVARIANT;
}

}  // namespace nmexport
