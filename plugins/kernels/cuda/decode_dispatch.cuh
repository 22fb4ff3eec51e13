// From run-time values to compiled decode shapes, one element type per translation unit.
#pragma once

#include "element.cuh"
#include "nm_cuda.h"

namespace nmexport::cuda
{

//! Launches the compiled shape of a plan; defined for float, __half and __nv_bfloat16 in decode_<type>.cu.
template <typename T>
cudaError_t launchDecodeOf(
    DecodeArgs const& args, DecodePlan const& plan, DeviceTraits const& device, cudaStream_t stream);

} // namespace nmexport::cuda
