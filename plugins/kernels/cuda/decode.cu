// The public decode functions: what is legal, the plan of a shape, the dispatch by element type.
#include "decode_dispatch.cuh"

#include "plan_table.h"

namespace nmexport::cuda
{
namespace
{

//! Most tokens that the decode kernel is given where nothing was measured.
constexpr int32_t kBREAK_EVEN_TOKENS = 2;

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

DecodePlan decodePlan(
    DeviceTraits const& device, DType type, int32_t tokens, int32_t channels, int32_t outputs, bool isGrouped)
{
    PlanRequest const request{type, tokens, channels, outputs, isGrouped};
    std::shared_ptr<PlanTable const> const table = activePlanTable();
    PlanRow const* const row = findPlan(*table, device, request);
    return row == nullptr ? planByRule(device, request) : row->plan;
}

bool decodeIsFaster(DeviceTraits const& device, DType type, int32_t tokens, int32_t channels, int32_t outputs)
{
    if (tokens > kMAX_DECODE_TOKENS)
    {
        return false;
    }
    std::shared_ptr<PlanTable const> const table = activePlanTable();
    PlanRow const* const row = findPlan(*table, device, {type, tokens, channels, outputs, false});
    return row == nullptr ? tokens <= kBREAK_EVEN_TOKENS : row->sparseUs <= row->maskedUs;
}

int setPlanTable(char const* text)
{
    PlanTable table;
    int const fault = parsePlanTable(text, &table);
    if (fault == 0)
    {
        usePlanTable(std::move(table));
    }
    return fault;
}

cudaError_t launchDecode(DecodeArgs const& args, DeviceTraits const& device, cudaStream_t stream)
{
    PlanRequest const request{
        args.type, args.tokens, args.channels, args.outputs, args.selection.channelOrder != nullptr};
    DecodePlan const plan = isTuned(args)
        ? decodePlan(device, args.type, args.tokens, args.channels, args.outputs, request.isGrouped)
        : planByRule(device, request);
    return launchDecodeWithPlan(args, plan, device, stream);
}

cudaError_t launchDecodeWithPlan(
    DecodeArgs const& args, DecodePlan const& plan, DeviceTraits const& device, cudaStream_t stream)
{
    if (!isValid(args))
    {
        return cudaErrorInvalidValue;
    }
    switch (args.type)
    {
    case DType::kFLOAT32: return launchDecodeOf<float>(args, plan, device, stream);
    case DType::kFLOAT16: return launchDecodeOf<__half>(args, plan, device, stream);
    case DType::kBFLOAT16: return launchDecodeOf<__nv_bfloat16>(args, plan, device, stream);
    }
    return cudaErrorInvalidValue;
}

} // namespace nmexport::cuda
