// Compiled for the baseline of the architecture.
#include "variant.h"
// The parts of a variant, in order of use.
#include "product.inl"
#include "select.inl"
#include "simd_portable.h"
#include "table.inl"
#include "token.inl"

namespace nmexport {

const Variant& portableVariant() {
    static constexpr Variant kVARIANT = makeVariant("portable");
    return kVARIANT;
}

}  // namespace nmexport
