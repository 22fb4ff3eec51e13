// The device and stream of a run, which every op of the CUDA provider asks for.
#pragma once

#include <cuda_runtime_api.h>

#include "element.h"
#include "nm_cuda.h"
#include "ort_api.h"

namespace nmexport {

cuda::DType elementOf(ElementType type);

// ONNX Runtime sets the device of its provider before it makes or runs a kernel.
const cuda::DeviceTraits& currentDevice();

cudaStream_t streamOf(const OrtApi& api, OrtKernelContext* context);

// Allocates an output and returns its data.
void* outputAt(const OrtApi& api, OrtKernelContext* context, std::size_t index, const Shape& shape);

}  // namespace nmexport
