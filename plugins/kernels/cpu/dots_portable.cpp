// Compiled for the baseline of the architecture.
#include "dots.h"

// The parts: each needs those before it.
// clang-format off
#include "dot_portable.h"
#include "dot_steps.inl"
#include "row_dots.inl"
#include "tile_dots.inl"
#include "quantise.inl"
#include "dot_table.inl"
// clang-format on

namespace nmexport {

const DotKernels& portableDots() {
    static constexpr DotKernels kDOTS = makeDots("portable");
    return kDOTS;
}

}  // namespace nmexport
