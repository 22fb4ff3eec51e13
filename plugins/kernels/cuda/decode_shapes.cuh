// The compiled decode shapes of one element type.
#pragma once

#include "decode_dispatch.cuh"
#include "decode_kernel.cuh"

namespace nmexport::cuda
{

template <typename T, int TOKENS, int GROUP, int LANES, int WARPS, bool MOMENTS, bool PACKED, bool ALIGNED>
cudaError_t launchCompiled(DecodeArgs const& args, int cluster, DeviceTraits const& device, cudaStream_t stream)
{
    constexpr int kUNROLL = TOKENS > 2 || !ALIGNED ? 4 : 8;
    // Three CTAs per multiprocessor where the registers suffice without spilling.
    constexpr bool kIS_LEAN = TOKENS == 1 && WARPS == 8 && !MOMENTS && ALIGNED && (PACKED || LANES == 32);
    constexpr int kMIN_CTAS = kIS_LEAN ? 3 : 1;
    using Shape = DecodeShape<T, TOKENS, GROUP, LANES, 1, WARPS, kUNROLL, true, MOMENTS, PACKED, ALIGNED>;
    return launchDecodeShape<Shape, kMIN_CTAS>(args, cluster, device.computeCapability, stream);
}

template <typename T, int TOKENS, int GROUP, int LANES, bool MOMENTS, bool PACKED>
cudaError_t launchWarps(DecodeArgs const& args, DecodePlan const& plan, DeviceTraits const& device, cudaStream_t stream)
{
    if constexpr (TOKENS == 1)
    {
        if (plan.warps == 16)
        {
            return launchCompiled<T, TOKENS, GROUP, LANES, 16, MOMENTS, PACKED, true>(
                args, plan.cluster, device, stream);
        }
    }
    return launchCompiled<T, TOKENS, GROUP, LANES, 8, MOMENTS, PACKED, true>(args, plan.cluster, device, stream);
}

template <typename T, int TOKENS, int GROUP, bool MOMENTS, bool PACKED>
cudaError_t launchLanes(DecodeArgs const& args, DecodePlan const& plan, DeviceTraits const& device, cudaStream_t stream)
{
    switch (plan.lanesPerRow)
    {
    case 8: return launchWarps<T, TOKENS, GROUP, 8, MOMENTS, PACKED>(args, plan, device, stream);
    case 16: return launchWarps<T, TOKENS, GROUP, 16, MOMENTS, PACKED>(args, plan, device, stream);
    case 32: return launchWarps<T, TOKENS, GROUP, 32, MOMENTS, PACKED>(args, plan, device, stream);
    default: return cudaErrorInvalidValue;
    }
}

template <typename T, int TOKENS, int GROUP, bool PACKED>
cudaError_t launchMoments(
    DecodeArgs const& args, DecodePlan const& plan, DeviceTraits const& device, cudaStream_t stream)
{
    return args.selection.varianceCorrection ? launchLanes<T, TOKENS, GROUP, true, PACKED>(args, plan, device, stream)
                                             : launchLanes<T, TOKENS, GROUP, false, PACKED>(args, plan, device, stream);
}

template <typename T, int TOKENS>
cudaError_t launchTokens(
    DecodeArgs const& args, DecodePlan const& plan, DeviceTraits const& device, cudaStream_t stream)
{
    Selection const& selection = args.selection;
    bool const isAligned = reinterpret_cast<uintptr_t>(args.w) % 16 == 0 && args.outputs % kVECTOR<T> == 0;
    if (!isAligned)
    {
        return launchCompiled<T, TOKENS, 0, 16, 8, true, false, false>(args, plan.cluster, device, stream);
    }
    if (selection.m != 16)
    {
        return launchMoments<T, TOKENS, 0, false>(args, plan, device, stream);
    }
    if constexpr (sizeof(T) == 2)
    {
        bool const isBareMagnitude = selection.scoreScale == nullptr && selection.shift == nullptr
            && !selection.dynamicShift && reinterpret_cast<uintptr_t>(args.x) % 4 == 0;
        if (isBareMagnitude)
        {
            return launchMoments<T, TOKENS, 16, true>(args, plan, device, stream);
        }
    }
    return launchMoments<T, TOKENS, 16, false>(args, plan, device, stream);
}

template <typename T>
cudaError_t launchDecodeOf(
    DecodeArgs const& args, DecodePlan const& plan, DeviceTraits const& device, cudaStream_t stream)
{
    switch (args.tokens)
    {
    case 1: return launchTokens<T, 1>(args, plan, device, stream);
    case 2: return launchTokens<T, 2>(args, plan, device, stream);
    case 3: return launchTokens<T, 3>(args, plan, device, stream);
    case 4: return launchTokens<T, 4>(args, plan, device, stream);
    default: return cudaErrorInvalidValue;
    }
}

} // namespace nmexport::cuda
