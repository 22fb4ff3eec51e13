// The compiled shapes of one kind of storage.
#pragma once

#include "stored_dispatch.cuh"
#include "stored_kernel.cuh"

namespace nmexport::cuda {

template <typename T, Storage STORAGE, int INDEX>
cudaError_t launchStoredShape(StoredArgs const& args, DecodePlan const& plan,
                              DeviceTraits const& device, cudaStream_t stream) {
    constexpr StoredPlanShape kSHAPE = kSTORED_SHAPES[INDEX];
    constexpr WeightType kTYPE = STORAGE == Storage::kINT4 ? WeightType::kINT4 : WeightType::kINT8;
    constexpr int kCTAS = residentStoredWarps(kTYPE, kSHAPE) / kSHAPE.warps;
    using Shape = StoredShape<T, STORAGE, 1, kSHAPE.warps, kSHAPE.unroll>;
    return launchTiles<Shape, StoredArgs>(&storedKernel<Shape, kCTAS>, args, args.linear.outputs,
                                          args.linear.tokens, plan, device, stream);
}

template <typename T, Storage STORAGE>
cudaError_t launchStoredOf(StoredArgs const& args, DecodePlan const& plan,
                           DeviceTraits const& device, cudaStream_t stream) {
    if (args.linear.tokens > kMAX_PRUNED_TOKENS) {
        using Shape = StoredShape<T, STORAGE, 8, kEIGHT_TOKENS.warps, kEIGHT_TOKENS.unroll>;
        return launchTiles<Shape, StoredArgs>(
            &storedKernel<Shape, 1>, args, args.linear.outputs,
            ceilDivide(static_cast<int32_t>(args.linear.tokens), 8), plan, device, stream);
    }
    switch (plan.warps * 100 + plan.unroll) {
        case 408:
            return launchStoredShape<T, STORAGE, 0>(args, plan, device, stream);
        case 808:
            return launchStoredShape<T, STORAGE, 1>(args, plan, device, stream);
        case 404:
            return launchStoredShape<T, STORAGE, 2>(args, plan, device, stream);
        case 804:
            return launchStoredShape<T, STORAGE, 3>(args, plan, device, stream);
        default:
            return cudaErrorInvalidValue;
    }
}

}  // namespace nmexport::cuda
