// The public functions for stored rows: what is legal, the plan, the dispatch by type.
#include "stored.h"

#include "stored_dispatch.cuh"

namespace nmexport::cuda {
namespace {

bool isValid(LinearArgs const& args) {
    bool const hasShift = !args.selection.dynamicShift || args.shiftWeight != nullptr;
    return args.tokens >= 1 && args.tokens <= kMAX_STORED_TOKENS && hasShift && args.x != nullptr &&
           args.w != nullptr && args.y != nullptr && args.stored.scale != nullptr;
}

template <typename T>
cudaError_t launchOf(StoredArgs const& args, DecodePlan const& plan, DeviceTraits const& device,
                     cudaStream_t stream) {
    switch (args.linear.stored.type) {
        case WeightType::kINT8:
            return launchStoredOf<T, Storage::kINT8>(args, plan, device, stream);
        case WeightType::kINT4:
        case WeightType::kUINT4:
            return launchStoredOf<T, Storage::kINT4>(args, plan, device, stream);
        case WeightType::kFLOAT8:
            return launchStoredOf<T, Storage::kFLOAT8>(args, plan, device, stream);
        default:
            return cudaErrorInvalidValue;
    }
}

}  // namespace

cudaError_t launchStored(LinearArgs const& args, TokenCorrections const& corrections,
                         DeviceTraits const& device, cudaStream_t stream) {
    return launchStoredWithPlan(args, corrections, storedPlan(args, device), device, stream);
}

cudaError_t launchStoredWithPlan(LinearArgs const& args, TokenCorrections const& corrections,
                                 DecodePlan const& plan, DeviceTraits const& device,
                                 cudaStream_t stream) {
    bool const hasCorrections = (corrections.eta != nullptr) == args.selection.dynamicShift &&
                                (corrections.nu != nullptr) == args.selection.varianceCorrection;
    if (!isValid(args) || !hasCorrections || !hasStoredRows(args) ||
        device.computeCapability < kSTORED_CAPABILITY) {
        return cudaErrorInvalidValue;
    }
    bool const isDense = !args.isPruned && args.selection.n == args.selection.m;
    StoredArgs const given{args, corrections, groupShiftOf(args), isDense};
    return args.type == DType::kFLOAT16 ? launchOf<__half>(given, plan, device, stream)
                                        : launchOf<__nv_bfloat16>(given, plan, device, stream);
}

}  // namespace nmexport::cuda
