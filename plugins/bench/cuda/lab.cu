// C entry points of the kernel lab, for ctypes: the product's functions and a read ceiling.
#include "device_primitives.cuh"
#include "nm_cuda.h"

using namespace nmexport::cuda;

namespace {

//! Reads a buffer once with 16-byte loads: the read ceiling.
__global__ void __launch_bounds__(512)
    readKernel(uint4 const* data, int64_t vectors, uint32_t* sink) {
    allowDependentLaunch();
    waitForPredecessors();
    uint32_t mix = 0;
    int64_t const stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
#pragma unroll 8
    for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < vectors;
         i += stride) {
        uint4 const v = loadStreaming(data + i);
        mix ^= v.x ^ v.y ^ v.z ^ v.w;
    }
    if (mix == 0x9e3779b9U) {
        *sink = mix;
    }
}

DeviceTraits const& device() {
    static DeviceTraits const traits = [] {
        DeviceTraits read{};
        queryDevice(&read);
        return read;
    }();
    return traits;
}

}  // namespace

extern "C" {

int labDecodePlan(LinearArgs const* args, DecodePlan const* plan, cudaStream_t stream) {
    return launchDecodeWithPlan(*args, *plan, device(), stream);
}

int labDecode(LinearArgs const* args, cudaStream_t stream) {
    return launchDecode(*args, device(), stream);
}

int labMask(MaskArgs const* args, cudaStream_t stream) {
    return launchMask(*args, stream);
}

int labEpilogue(EpilogueArgs const* args, cudaStream_t stream) {
    return launchEpilogue(*args, stream);
}

void labPlan(int type, int tokens, int channels, int outputs, DecodePlan* plan) {
    *plan = decodePlan(device(), static_cast<DType>(type), tokens, channels, outputs);
}

//! Reads `bytes` bytes once.
int labRead(void const* data, int64_t bytes, uint32_t* sink, int blocks, cudaStream_t stream) {
    readKernel<<<blocks, 512, 0, stream>>>(static_cast<uint4 const*>(data), bytes / 16, sink);
    return cudaGetLastError();
}

}  // extern "C"
