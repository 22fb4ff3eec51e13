// What is known of the device, and of the code that runs on it.
#include "device.h"

#include <algorithm>

namespace nmexport::cuda {

cudaError_t queryDevice(DeviceTraits* traits) {
    int device = 0;
    int major = 0;
    int minor = 0;
    cudaError_t status = cudaGetDevice(&device);
    auto const read = [&](int* target, cudaDeviceAttr attribute) {
        if (status == cudaSuccess) {
            status = cudaDeviceGetAttribute(target, attribute, device);
        }
    };
    read(&major, cudaDevAttrComputeCapabilityMajor);
    read(&minor, cudaDevAttrComputeCapabilityMinor);
    read(&traits->multiprocessors, cudaDevAttrMultiProcessorCount);
    read(&traits->sharedBytesPerBlock, cudaDevAttrMaxSharedMemoryPerBlockOptin);
    cudaFuncAttributes compiled{};
    if (status == cudaSuccess) {
        status = cudaFuncGetAttributes(&compiled, architectureProbe());
    }
    // Code of an older architecture, compiled on the spot from its PTX, has neither the wait of
    // dependent launch nor clusters, whatever the chip has: launched with them it would read too
    // early and add up too little.
    traits->computeCapability = std::min(10 * major + minor, compiled.ptxVersion);
    return status;
}

}  // namespace nmexport::cuda
