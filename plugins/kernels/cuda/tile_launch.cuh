// Launches a kernel of column tiles and clusters in the chain of dependent launches.
#pragma once

#include "decode_memory.h"
#include "device_primitives.cuh"
#include "nm_cuda.h"
#include "work_split.h"

namespace nmexport::cuda {

//! Enqueues a kernel of this shape in the chain of dependent launches, with as much of the plan's
//! cluster as the code and the chip's shared memory allow. grid.y = `layers`.
template <typename Shape, typename Args>
cudaError_t launchTiles(void (*kernel)(Args, bool), Args const& args, int32_t outputs,
                        int64_t layers, DecodePlan const& plan, DeviceTraits const& device,
                        cudaStream_t stream) {
    bool const hasClusters = device.computeCapability >= 90;  // and dependent launch
    int const cluster = fittingCluster(Shape::FOOTPRINT, hasClusters ? plan.cluster : 1,
                                       device.sharedBytesPerBlock);
    if (cluster < 1) {
        return cudaErrorInvalidConfiguration;
    }
    size_t const sharedBytes = decodeSharedBytes(Shape::FOOTPRINT, cluster);
    cudaError_t const raised = allowSharedBytes(kernel, sharedBytes);
    if (raised != cudaSuccess) {
        return raised;
    }
    cudaLaunchAttribute attributes[2] = {};
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim.x = static_cast<unsigned>(cluster);
    attributes[1].val.clusterDim.y = 1;
    attributes[1].val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    int32_t const tiles = ceilDivide(outputs, Shape::COLUMNS);
    config.gridDim = dim3(static_cast<unsigned>(tiles * cluster), static_cast<unsigned>(layers));
    config.blockDim = dim3(Shape::THREADS);
    config.dynamicSmemBytes = sharedBytes;
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = hasClusters ? (cluster > 1 ? 2U : 1U) : 0U;
    return cudaLaunchKernelEx(&config, kernel, args, plan.allowsNextLate != 0);
}

}  // namespace nmexport::cuda
