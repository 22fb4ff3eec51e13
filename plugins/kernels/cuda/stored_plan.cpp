// Which stored weights the kernel takes, and with what plan; on the host alone.
#include "stored.h"

#include <algorithm>

namespace nmexport::cuda {
namespace {

constexpr int32_t kWHOLE_SHIFT = 27;  // one group: more channels than a window's 1 << (27 + 3)

bool isAligned(void const* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

bool isNarrow(WeightType type) {
    return type == WeightType::kINT4 || type == WeightType::kUINT4;
}

//! Columns that 16 bytes of a row hold.
int32_t vectorOf(WeightType type) {
    return isNarrow(type) ? 32 : 16;
}

bool isPowerOfTwo(int32_t value) {
    return value > 0 && (value & (value - 1)) == 0;
}

}  // namespace

bool hasStoredRows(LinearArgs const& args) {
    StoredWeights const& stored = args.stored;
    bool const hasGroups =
        stored.groups == 1 ||
        (stored.groups > 1 && args.channels % stored.groups == 0 &&
         isPowerOfTwo(args.channels / stored.groups) && args.channels / stored.groups >= 16);
    return stored.type != WeightType::kT && args.type != DType::kFLOAT32 &&
           args.channels % 16 == 0 && args.outputs % vectorOf(stored.type) == 0 && hasGroups &&
           isAligned(args.w) && isAligned(stored.scale) && isAligned(stored.zeroPoint) &&
           reinterpret_cast<uintptr_t>(args.x) % 4 == 0;
}

DecodePlan storedPlan(LinearArgs const& args, DeviceTraits const& device) {
    bool const isAlone = args.tokens <= kMAX_PRUNED_TOKENS;
    int32_t const columns = 8 * vectorOf(args.stored.type);
    int32_t const tiles = (args.outputs + columns - 1) / columns;
    int32_t const splits = device.computeCapability >= 90 ? 8 : 1;
    // Few tiles: long blocks, so that every multiprocessor has its share of loads in flight.
    StoredPlanShape const one =
        tiles * splits < 3 * device.multiprocessors ? kSTORED_SHAPES[1] : kSTORED_SHAPES[0];
    StoredPlanShape const shape = isAlone ? one : kEIGHT_TOKENS;
    int32_t const resident = residentStoredWarps(args.stored.type, shape);
    int32_t const blocks = device.multiprocessors * (resident / shape.warps);
    int32_t const useful = std::max(args.channels / (shape.warps * 32), 1);
    DecodePlan plan{};
    plan.lanesPerRow = 8;
    plan.warps = shape.warps;
    plan.unroll = shape.unroll;
    plan.overlap = 1;
    plan.residentWarps = resident;
    plan.cluster = std::max(1, std::min({splits, useful, blocks / tiles}));
    return plan;
}

int32_t groupShiftOf(LinearArgs const& args) {
    if (args.stored.groups == 1) {
        return kWHOLE_SHIFT;
    }
    int32_t shift = 0;
    while (1 << shift < args.channels / args.stored.groups) {
        ++shift;
    }
    return shift;
}

}  // namespace nmexport::cuda
