// The public decode functions: what is legal, the plan of a shape, the dispatch by element type.
#include "decode_dispatch.cuh"

#include "work_split.h"

#include <algorithm>

namespace nmexport::cuda
{
namespace
{

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
    int32_t const multiprocessors = std::max(device.multiprocessors, 1);
    int32_t const splits = device.computeCapability >= 90 ? 8 : 1;
    DecodePlan plan{};
    plan.unroll = tokens > 2 ? 4 : 8;
    plan.overlap = 1;
    plan.residentWarps = 24;
    // The widest row segment whose tiles, split over K as far as a cluster goes, still occupy most multiprocessors.
    for (int32_t lanes : {32, 16, 8})
    {
        plan.lanesPerRow = lanes;
        if (ceilDivide(outputs, lanes * vector) * splits * 3 >= multiprocessors * 2)
        {
            break;
        }
    }
    int32_t const tiles = ceilDivide(outputs, plan.lanesPerRow * vector);
    // Few tiles: one large CTA on three quarters of the multiprocessors, so that the next kernel's start beside it.
    // Many: three CTAs of half the size each, all resident at once. Both measured on an H100.
    bool const hasFewTiles = tokens == 1 && tiles * 5 <= multiprocessors * 2;
    plan.warps = hasFewTiles ? 16 : 8;
    int32_t const wanted = hasFewTiles ? multiprocessors * 3 / 4 : multiprocessors * 8 / 3;
    int32_t const useful = std::max(channels / (plan.warps * 32), 1); // a warp should have 32 channels at least
    plan.cluster = std::max(1, std::min({splits, useful, wanted / tiles}));
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
    case DType::kFLOAT32: return launchDecodeOf<float>(args, plan, device, stream);
    case DType::kFLOAT16: return launchDecodeOf<__half>(args, plan, device, stream);
    case DType::kBFLOAT16: return launchDecodeOf<__nv_bfloat16>(args, plan, device, stream);
    }
    return cudaErrorInvalidValue;
}

} // namespace nmexport::cuda
