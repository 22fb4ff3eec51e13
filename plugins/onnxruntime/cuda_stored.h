// A W of integers or 8-bit floats as the CUDA kernels take it.
#pragma once

#include "custom_op.h"
#include "nm_cuda.h"

namespace nmexport {

// Scales and zero points of one node, which are constants and lie on the device.
struct StoredConstants {
    Shape scales;                // [G, O]
    const void* scale{nullptr};  // null where the node has none
    Shape zeros;
    const void* zero{nullptr};  // null where there are none
};

// The weights of a node whose X is of `type`; kT where W is of that type as well. Throws Fault if
// the shapes do not fit W, or if W is of X's type and has scales.
cuda::StoredWeights storedWeights(const char* op, ElementType type, const StoredTypes& types,
                                  const Shape& w, const StoredConstants& constants);

}  // namespace nmexport
