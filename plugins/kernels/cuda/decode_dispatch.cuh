// From run-time values to compiled decode shapes, one element type per translation unit.
#pragma once

#include "element.cuh"
#include "nm_cuda.h"

#include <cstdint>

namespace nmexport::cuda {

//! True where the scores are the magnitudes of 16-bit elements, not float32 values that a shift or
//! scale made.
inline bool isBareMagnitude(LinearArgs const& args) {
    Selection const& s = args.selection;
    return args.type != DType::kFLOAT32 && s.scoreScale == nullptr && s.valueScale == nullptr &&
           s.shift == nullptr && !s.dynamicShift && reinterpret_cast<uintptr_t>(args.x) % 4 == 0;
}

//! True where each row of W starts on 16 bytes.
inline bool hasAlignedRows(LinearArgs const& args) {
    int64_t const bytes = args.type == DType::kFLOAT32 ? 4 : 2;
    return reinterpret_cast<uintptr_t>(args.w) % 16 == 0 && args.outputs * bytes % 16 == 0;
}

//! True where the plans of a table apply; everything else has one family of shapes.
inline bool isTuned(LinearArgs const& args) {
    Selection const& s = args.selection;
    return (args.tokens == 1 || args.isPruned) && args.type != DType::kFLOAT32 && s.m == 16 &&
           !s.varianceCorrection && hasAlignedRows(args);
}

//! Launches the compiled shape of a plan; defined for float, __half and __nv_bfloat16 in
//! decode_<type>.cu.
template <typename T>
cudaError_t launchDecodeOf(LinearArgs const& args, DecodePlan const& plan,
                           DeviceTraits const& device, cudaStream_t stream);

}  // namespace nmexport::cuda
