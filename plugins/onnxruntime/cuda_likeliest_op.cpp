// Likeliest for the CUDA provider, and memory of the host that its kernels read and write.
#include <cuda_runtime_api.h>

#include "cuda_device.h"
#include "cuda_fault.h"
#include "fused_op.h"
#include "likeliest.h"

namespace nmexport {

namespace {

class CudaLikeliestKernel : public Kernel {
  public:
    CudaLikeliestKernel(const OrtApi& api, ElementType type) : mApi(api), mType(type) {}

    void run(OrtKernelContext* context) const override {
        const OrtValue* x = nullptr;
        check(mApi, mApi.KernelContext_GetInput(context, 0, &x));
        Shape shape = shapeOf(mApi, x);
        if (shape.empty() || shape.back() < 1 || shape.back() > INT32_MAX) {
            throw Fault("Likeliest: the last axis needs an element at least");
        }
        cuda::LikeliestArgs args;
        args.type = elementOf(mType);
        args.columns = static_cast<std::int32_t>(shape.back());
        args.x = dataOf(mApi, x);
        shape.pop_back();
        args.rows = 1;
        for (const std::int64_t size : shape) args.rows *= size;
        args.ids = static_cast<std::int64_t*>(outputAt(mApi, context, 0, shape));
        cuda::checkCuda(cuda::launchLikeliest(args, currentDevice(), streamOf(mApi, context)),
                        "the kernel that finds the likeliest token");
    }

  private:
    const OrtApi& mApi;
    ElementType mType;
};

}  // namespace

std::unique_ptr<Kernel> makeCudaLikeliestKernel(const OrtApi& api, const OrtKernelInfo* /*info*/,
                                                ElementType type) {
    return std::make_unique<CudaLikeliestKernel>(api, type);
}

}  // namespace nmexport

// Memory of the host at an address that kernels read and write too; null where there is none.
extern "C" __attribute__((visibility("default"))) void* nmexport_cuda_host_memory(
    std::size_t bytes) {
    void* data = nullptr;
    const unsigned flags = cudaHostAllocMapped | cudaHostAllocPortable;
    return cudaHostAlloc(&data, bytes, flags) == cudaSuccess ? data : nullptr;
}

extern "C" __attribute__((visibility("default"))) void nmexport_cuda_free_host_memory(void* data) {
    cudaFreeHost(data);
}

// Waits for all work that was started on the current device; 0, or the error it ended with.
extern "C" __attribute__((visibility("default"))) int nmexport_cuda_wait() {
    return static_cast<int>(cudaDeviceSynchronize());
}

// Bytes of the current device's memory that nobody uses; 0 where the driver does not say.
extern "C" __attribute__((visibility("default"))) std::size_t nmexport_cuda_free_memory() {
    std::size_t free = 0;
    std::size_t total = 0;
    return cudaMemGetInfo(&free, &total) == cudaSuccess ? free : 0;
}
