// What queryDevice says of a chip, on a CUDA runtime that this test stands in for.
#include "device.h"

#include <cstdio>
#include <cstdlib>

namespace {

int failures = 0;

void check(bool ok, char const* what) {
    if (!ok) {
        ++failures;
        std::printf("FAILED %s\n", what);
    }
}

//! The chip and code that the stand-ins below tell of.
struct Machine {
    int major;
    int minor;
    int compiledFor;
    cudaError_t attributes{cudaSuccess};
    cudaError_t function{cudaSuccess};
};

Machine machine{};
char const probe = 0;

}  // namespace

extern "C" cudaError_t cudaGetDevice(int* device) {
    *device = 3;
    return cudaSuccess;
}

extern "C" cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
    check(device == 3, "the current device is asked");
    switch (attribute) {
        case cudaDevAttrComputeCapabilityMajor:
            *value = machine.major;
            break;
        case cudaDevAttrComputeCapabilityMinor:
            *value = machine.minor;
            break;
        case cudaDevAttrMultiProcessorCount:
            *value = 132;
            break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin:
            *value = 232448;
            break;
        default:
            check(false, "an attribute that the test does not know");
    }
    return machine.attributes;
}

extern "C" cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void const* function) {
    check(function == &probe, "the library's own code is asked for");
    attributes->ptxVersion = machine.compiledFor;
    attributes->binaryVersion = 10 * machine.major + machine.minor;
    return machine.function;
}

namespace nmexport::cuda {

void const* architectureProbe() {
    return &probe;
}

}  // namespace nmexport::cuda

int main() {
    using namespace nmexport::cuda;
    DeviceTraits traits{};
    machine = {9, 0, 90};
    check(queryDevice(&traits) == cudaSuccess, "a device");
    check(traits.computeCapability == 90 && traits.multiprocessors == 132, "capability and size");
    check(traits.sharedBytesPerBlock == 232448, "shared memory");

    machine = {9, 0, 80};
    check(queryDevice(&traits) == cudaSuccess && traits.computeCapability == 80,
          "code from older PTX: no clusters");
    machine = {8, 9, 86};
    check(queryDevice(&traits) == cudaSuccess && traits.computeCapability == 86,
          "code of the same generation");
    machine = {12, 1, 120};
    check(queryDevice(&traits) == cudaSuccess && traits.computeCapability == 120,
          "a chip newer than the code");

    machine = {9, 0, 90, cudaSuccess, cudaErrorNoKernelImageForDevice};
    check(queryDevice(&traits) == cudaErrorNoKernelImageForDevice, "no code for this chip");
    machine = {9, 0, 90, cudaErrorInvalidDevice, cudaSuccess};
    check(queryDevice(&traits) == cudaErrorInvalidDevice, "no device");
    std::printf("%d failed\n", failures);
    return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
