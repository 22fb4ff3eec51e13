// Which decode kernel runs: the plan of a shape, and the dispatch from run-time values to compiled shapes.
#include "decode_kernel.cuh"

#include <algorithm>

namespace nmexport::cuda
{
namespace
{

//! CTAs that should be resident per multiprocessor so that the next kernel's fit beside this one's.
template <int WARPS, int UNROLL, int TOKENS>
inline constexpr int kMIN_CTAS = TOKENS > 1 || UNROLL > 8 ? std::max(1, 16 / WARPS) : std::max(1, 24 / WARPS);

template <typename T, int TOKENS, int GROUP, bool MOMENTS, bool ALIGNED, int LANES, int WARPS, int UNROLL>
cudaError_t launchShape(DecodeArgs const& args, int cluster, DeviceTraits const& device, cudaStream_t stream)
{
    using Shape = DecodeShape<T, TOKENS, GROUP, LANES, 1, WARPS, UNROLL, true, MOMENTS, ALIGNED>;
    return launchDecodeShape<Shape, MOMENTS ? 1 : kMIN_CTAS<WARPS, UNROLL, TOKENS>>(
        args, cluster, device.computeCapability, stream);
}

//! The plain product on aligned rows has every row width; the rest runs at one width.
template <typename T, int TOKENS, int GROUP>
cudaError_t launchAligned(
    DecodeArgs const& args, DecodePlan const& plan, DeviceTraits const& device, cudaStream_t stream)
{
    constexpr int kUNROLL = TOKENS > 2 ? 4 : 8;
    switch (plan.lanesPerRow)
    {
    case 8: return launchShape<T, TOKENS, GROUP, false, true, 8, 8, kUNROLL>(args, plan.cluster, device, stream);
    case 16: return launchShape<T, TOKENS, GROUP, false, true, 16, 8, kUNROLL>(args, plan.cluster, device, stream);
    case 32: return launchShape<T, TOKENS, GROUP, false, true, 32, 8, kUNROLL>(args, plan.cluster, device, stream);
    default: return cudaErrorInvalidValue;
    }
}

template <typename T, int TOKENS>
cudaError_t launchTokens(
    DecodeArgs const& args, DecodePlan const& plan, DeviceTraits const& device, cudaStream_t stream)
{
    bool const isAligned = reinterpret_cast<uintptr_t>(args.w) % 16 == 0 && args.outputs % kVECTOR<T> == 0;
    if (!isAligned)
    {
        return args.selection.varianceCorrection
            ? launchShape<T, TOKENS, 0, true, false, 16, 8, 4>(args, plan.cluster, device, stream)
            : launchShape<T, TOKENS, 0, false, false, 16, 8, 4>(args, plan.cluster, device, stream);
    }
    if (args.selection.varianceCorrection)
    {
        return args.selection.m == 16
            ? launchShape<T, TOKENS, 16, true, true, 16, 8, 4>(args, plan.cluster, device, stream)
            : launchShape<T, TOKENS, 0, true, true, 16, 8, 4>(args, plan.cluster, device, stream);
    }
    return args.selection.m == 16 ? launchAligned<T, TOKENS, 16>(args, plan, device, stream)
                                  : launchAligned<T, TOKENS, 0>(args, plan, device, stream);
}

template <typename T>
cudaError_t launchType(
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

bool isValid(DecodeArgs const& args)
{
    Selection const& s = args.selection;
    bool const hasPattern = s.m >= 1 && s.m <= kMAX_GROUP && s.n >= 1 && s.n <= s.m && args.channels >= s.m
        && args.channels % s.m == 0;
    bool const hasShift = (s.shiftLength == 0 || s.shiftLength == 1 || s.shiftLength == args.channels)
        && (s.shiftLength == 0) == (s.shift == nullptr) && !(s.dynamicShift && s.shift != nullptr)
        && (!s.dynamicShift || args.shiftWeight != nullptr);
    return hasPattern && hasShift && args.outputs >= 1 && args.x != nullptr && args.w != nullptr && args.y != nullptr;
}

} // namespace

cudaError_t queryDevice(DeviceTraits* traits)
{
    int device = 0;
    int major = 0;
    int minor = 0;
    cudaError_t status = cudaGetDevice(&device);
    auto const read = [&](int* target, cudaDeviceAttr attribute)
    {
        if (status == cudaSuccess)
        {
            status = cudaDeviceGetAttribute(target, attribute, device);
        }
    };
    read(&major, cudaDevAttrComputeCapabilityMajor);
    read(&minor, cudaDevAttrComputeCapabilityMinor);
    read(&traits->multiprocessors, cudaDevAttrMultiProcessorCount);
    read(&traits->sharedBytesPerBlock, cudaDevAttrMaxSharedMemoryPerBlockOptin);
    traits->computeCapability = 10 * major + minor;
    return status;
}

DecodePlan decodePlan(DeviceTraits const& device, DType type, int32_t tokens, int32_t channels, int32_t outputs)
{
    int32_t const vector = type == DType::kFLOAT32 ? 4 : 8;
    DecodePlan plan{};
    plan.unroll = tokens > 2 ? 4 : 8;
    // Widest rows whose tiles, split over K by at most a cluster of 8, still give each multiprocessor two CTAs.
    int32_t const wanted = 2 * std::max(device.multiprocessors, 1) * 7 / 8;
    int32_t const splits = device.computeCapability >= 90 ? 8 : 1;
    for (int32_t lanes : {32, 16, 8})
    {
        plan.lanesPerRow = lanes;
        if (ceilDivide(outputs, lanes * vector) * splits >= wanted)
        {
            break;
        }
    }
    int32_t const tiles = ceilDivide(outputs, plan.lanesPerRow * vector);
    int32_t const usefulSplits = std::max(channels / 256, 1); // a warp should have at least 32 channels
    plan.cluster = std::min({splits, usefulSplits, std::max(ceilDivide(wanted, tiles), 1)});
    return plan;
}

cudaError_t launchDecode(DecodeArgs const& args, DeviceTraits const& device, cudaStream_t stream)
{
    if (!isValid(args))
    {
        return cudaErrorInvalidValue;
    }
    DecodePlan const plan = decodePlan(device, args.type, args.tokens, args.channels, args.outputs);
    switch (args.type)
    {
    case DType::kFLOAT32: return launchType<float>(args, plan, device, stream);
    case DType::kFLOAT16: return launchType<__half>(args, plan, device, stream);
    case DType::kBFLOAT16: return launchType<__nv_bfloat16>(args, plan, device, stream);
    }
    return cudaErrorInvalidValue;
}

} // namespace nmexport::cuda
