// The public decode functions: what is legal, the dispatch by element type.
#include "decode_dispatch.cuh"

#include "device.h"
#include "plan_table.h"
#include "stored.h"

namespace nmexport::cuda {
namespace {

__global__ void probeKernel() {}

bool isValid(LinearArgs const& args) {
    Selection const& s = args.selection;
    bool const hasPattern = s.m >= 1 && s.m <= kMAX_GROUP && s.n >= 1 && s.n <= s.m &&
                            args.channels >= s.m && args.channels % s.m == 0;
    bool const hasShift =
        (s.shiftLength == 0 || s.shiftLength == 1 || s.shiftLength == args.channels) &&
        (s.shiftLength == 0) == (s.shift == nullptr) && !(s.dynamicShift && s.shift != nullptr) &&
        (!s.dynamicShift || args.shiftWeight != nullptr);
    // A pruned x has nothing left to select, and is read two values at a time.
    bool const isSelected =
        !args.isPruned ||
        (s.n == s.m && s.m == 16 && s.channelOrder == nullptr && s.valueScale == nullptr &&
         s.shift == nullptr && !s.dynamicShift && !s.varianceCorrection &&
         args.type != DType::kFLOAT32 && reinterpret_cast<uintptr_t>(args.x) % 4 == 0);
    bool const hasElementWeights = args.stored.type == WeightType::kT;
    return hasPattern && hasShift && isSelected && hasElementWeights && args.outputs >= 1 &&
           args.x != nullptr && args.w != nullptr && args.y != nullptr;
}

//! True where x is s, as the kernel for stored rows needs it.
bool isSelectedAlready(LinearArgs const& args) {
    Selection const& s = args.selection;
    return args.isPruned || (s.n == s.m && s.channelOrder == nullptr && s.valueScale == nullptr &&
                             s.shift == nullptr && !s.dynamicShift && !s.varianceCorrection);
}

}  // namespace

void const* architectureProbe() {
    return reinterpret_cast<void const*>(&probeKernel);
}

cudaError_t launchDecode(LinearArgs const& args, DeviceTraits const& device, cudaStream_t stream) {
    if (args.stored.type != WeightType::kT) {
        return isSelectedAlready(args) ? launchStored(args, {}, device, stream)
                                       : cudaErrorInvalidValue;
    }
    if (args.tokens < 1 || args.tokens > kMAX_DECODE_TOKENS) {
        return cudaErrorInvalidValue;
    }
    int32_t const together = args.isPruned ? 1 : static_cast<int32_t>(args.tokens);
    PlanRequest const request{args.type, together, args.channels, args.outputs,
                              args.selection.channelOrder != nullptr};
    DecodePlan const plan = isTuned(args) ? decodePlan(device, args.type, together, args.channels,
                                                       args.outputs, request.isGrouped)
                                          : planByRule(device, request);
    return launchDecodeWithPlan(args, plan, device, stream);
}

cudaError_t launchDecodeWithPlan(LinearArgs const& args, DecodePlan const& plan,
                                 DeviceTraits const& device, cudaStream_t stream) {
    if (!isValid(args)) {
        return cudaErrorInvalidValue;
    }
    switch (args.type) {
        case DType::kFLOAT32:
            return launchDecodeOf<float>(args, plan, device, stream);
        case DType::kFLOAT16:
            return launchDecodeOf<__half>(args, plan, device, stream);
        case DType::kBFLOAT16:
            return launchDecodeOf<__nv_bfloat16>(args, plan, device, stream);
    }
    return cudaErrorInvalidValue;
}

}  // namespace nmexport::cuda
