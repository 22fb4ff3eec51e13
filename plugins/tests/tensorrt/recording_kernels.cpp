#include "recording_kernels.h"

#include "cuda_fault.h"

namespace nmexport::test {

Launches& launches() {
    static Launches all;
    return all;
}

}  // namespace nmexport::test

namespace nmexport::cuda {

using test::launches;

cudaError_t queryDevice(DeviceTraits* traits) {
    *traits = launches().device;
    return launches().next;
}

cudaError_t launchMask(MaskArgs const& args, cudaStream_t) {
    launches().order.push_back("mask");
    launches().masks.push_back(args);
    return launches().next;
}

// The recorded device has no chain of dependent launches.
bool canPrune(DType, int32_t, Selection const&) {
    return false;
}

bool canPruneInChain(MaskArgs const&) {
    return false;
}

cudaError_t launchPrune(MaskArgs const&, DeviceTraits const&, cudaStream_t) {
    return cudaErrorInvalidValue;
}

cudaError_t launchEpilogue(EpilogueArgs const& args, cudaStream_t) {
    launches().order.push_back("epilogue");
    launches().epilogues.push_back(args);
    return launches().next;
}

cudaError_t launchDecode(LinearArgs const& args, DeviceTraits const&, cudaStream_t) {
    launches().order.push_back("decode");
    launches().decodes.push_back(args);
    return launches().next;
}

cudaError_t launchStored(LinearArgs const& args, TokenCorrections const&, DeviceTraits const&,
                         cudaStream_t) {
    launches().order.push_back("stored");
    launches().decodes.push_back(args);
    return launches().next;
}

cudaError_t launchWiden(WidenArgs const& args, cudaStream_t) {
    launches().order.push_back("widen");
    launches().tiles.push_back(args);
    return launches().next;
}

struct DenseProduct::State {};
DenseProduct::DenseProduct() = default;
DenseProduct::~DenseProduct() = default;

void DenseProduct::prepare(const ProductShape&) {
    if (launches().noProduct) throw Fault("cuBLASLt is not found");
    launches().order.push_back("prepare");
}

void DenseProduct::enqueue(const ProductShape& shape, const void*, const void*, void* result,
                           void* workspace, cudaStream_t) {
    launches().order.push_back("product");
    launches().products.push_back(shape);
    launches().productResult = result;
    launches().productWorkspace = workspace;
}

}  // namespace nmexport::cuda

// The runtime's own text for errors, so that the tests link no CUDA library.
extern "C" const char* cudaGetErrorName(cudaError_t) {
    return "cudaErrorTest";
}
extern "C" const char* cudaGetErrorString(cudaError_t) {
    return "as the test wished";
}
