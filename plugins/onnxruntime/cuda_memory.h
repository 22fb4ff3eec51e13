// Device memory of the CUDA provider's own.
#pragma once

#include <string>

#include "ort_api.h"

namespace nmexport {

// Device memory of one run, from the session's arena in the name of the run's stream. Given back as
// soon as the work is enqueued: the arena hands it to work of the same stream, which is behind, and
// to another stream once that has waited for this one. What OrtAllocator::Alloc gives belongs to no
// stream, and another run of the session could get it while the kernels here still use it.
class DeviceScratch {
  public:
    DeviceScratch(const OrtApi& api, OrtKernelContext* context, OrtAllocator* allocator,
                  std::size_t bytes)
        : mAllocator(allocator) {
        if (bytes == 0) return;
        check(api, api.KernelContext_GetScratchBuffer(context, allocator->Info(allocator), bytes,
                                                      &mData));
        if (mData == nullptr) {
            throw Fault("nmexport: no " + std::to_string(bytes) + " bytes of device memory left");
        }
    }
    ~DeviceScratch() {
        if (mData != nullptr) mAllocator->Free(mAllocator, mData);
    }
    DeviceScratch(const DeviceScratch&) = delete;
    DeviceScratch& operator=(const DeviceScratch&) = delete;

    void* data() const { return mData; }

  private:
    OrtAllocator* mAllocator;
    void* mData = nullptr;
};

class DeviceAllocator {
  public:
    DeviceAllocator(const OrtApi& api, const OrtKernelInfo* info) : mApi(api) {
        check(api, api.KernelInfoGetAllocator(info, OrtMemTypeDefault, &mAllocator));
    }
    ~DeviceAllocator() { mApi.ReleaseAllocator(mAllocator); }
    DeviceAllocator(const DeviceAllocator&) = delete;
    DeviceAllocator& operator=(const DeviceAllocator&) = delete;
    OrtAllocator* get() const { return mAllocator; }

  private:
    const OrtApi& mApi;
    OrtAllocator* mAllocator = nullptr;
};

}  // namespace nmexport
