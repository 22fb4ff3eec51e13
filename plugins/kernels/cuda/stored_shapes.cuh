// The compiled shapes of one kind of storage.
#pragma once

#include "stored_dispatch.cuh"
#include "stored_kernel.cuh"

namespace nmexport::cuda {

//! Launches one shape, for 1 or 8 tokens at a time.
template <typename T, Storage STORAGE, int TOKENS, int WARPS, int UNROLL>
cudaError_t launchStoredShape(StoredArgs const& args, DecodePlan const& plan,
                              DeviceTraits const& device, cudaStream_t stream) {
    constexpr WeightType kTYPE = STORAGE == Storage::kINT4 ? WeightType::kINT4 : WeightType::kINT8;
    constexpr int kCTAS = residentStoredWarps(kTYPE, TOKENS == 1) / WARPS;
    using Shape = StoredShape<T, STORAGE, TOKENS, WARPS, UNROLL>;
    int32_t const layers = ceilDivide(static_cast<int32_t>(args.linear.tokens), TOKENS);
    return launchTiles<Shape, StoredArgs>(&storedKernel<Shape, kCTAS>, args, args.linear.outputs,
                                          layers, plan, device, stream);
}

template <typename T, Storage STORAGE>
cudaError_t launchStoredOf(StoredArgs const& args, DecodePlan const& plan,
                           DeviceTraits const& device, cudaStream_t stream) {
    if (args.linear.tokens > kMAX_PRUNED_TOKENS) {
        return launchStoredShape<T, STORAGE, 8, kEIGHT_TOKENS.warps, kEIGHT_TOKENS.unroll>(
            args, plan, device, stream);
    }
    switch (plan.warps * 100 + plan.unroll) {
        case 408:
            return launchStoredShape<T, STORAGE, 1, 4, 8>(args, plan, device, stream);
        case 804:
            return launchStoredShape<T, STORAGE, 1, 8, 4>(args, plan, device, stream);
        case 808:
            return launchStoredShape<T, STORAGE, 1, 8, 8>(args, plan, device, stream);
        case 1604:
            if constexpr (STORAGE == Storage::kINT4) {
                return launchStoredShape<T, STORAGE, 1, 16, 4>(args, plan, device, stream);
            }
            return cudaErrorInvalidValue;
        default:
            return cudaErrorInvalidValue;
    }
}

}  // namespace nmexport::cuda
