// Compiled for the baseline of the architecture.
#include "dots.h"

// The parts: each needs those before it.
// clang-format off
#include "dot_portable.h"
#include "dots.inl"
// clang-format on

namespace nmexport {

const DotKernels& portableDots() {
    static constexpr DotKernels kDOTS = makeDots("portable");
    return kDOTS;
}

}  // namespace nmexport
