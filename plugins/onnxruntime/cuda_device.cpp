#include "cuda_device.h"

#include <memory>
#include <mutex>

#include "cuda_fault.h"

namespace nmexport {

cuda::DType elementOf(ElementType type) {
    switch (type) {
        case ElementType::kFLOAT16:
            return cuda::DType::kFLOAT16;
        case ElementType::kBFLOAT16:
            return cuda::DType::kBFLOAT16;
        default:
            return cuda::DType::kFLOAT32;
    }
}

// ONNX Runtime sets the device of its provider before it makes or runs a kernel.
const cuda::DeviceTraits& currentDevice() {
    static std::mutex mutex;
    static std::vector<std::unique_ptr<cuda::DeviceTraits>> known;
    int device = 0;
    cuda::checkCuda(cudaGetDevice(&device), "asking for the current CUDA device");
    const std::lock_guard<std::mutex> lock(mutex);
    const std::size_t index = static_cast<std::size_t>(device);
    if (known.size() <= index) known.resize(index + 1);
    if (known[index] == nullptr) {
        auto traits = std::make_unique<cuda::DeviceTraits>();
        cuda::checkCuda(cuda::queryDevice(traits.get()), "asking the CUDA device what it is");
        known[index] = std::move(traits);
    }
    return *known[index];
}

cudaStream_t streamOf(const OrtApi& api, OrtKernelContext* context) {
    void* stream = nullptr;
    check(api, api.KernelContext_GetGPUComputeStream(context, &stream));
    return static_cast<cudaStream_t>(stream);
}

void* outputAt(const OrtApi& api, OrtKernelContext* context, std::size_t index,
               const Shape& shape) {
    OrtValue* output = nullptr;
    check(api, api.KernelContext_GetOutput(context, index, shape.data(), shape.size(), &output));
    return dataOf(api, output);
}

}  // namespace nmexport
