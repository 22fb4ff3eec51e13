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

constexpr int32_t kMAX_CLUSTER = 8;
constexpr int32_t kLONG = 8192;  // channels

//! Few tiles of bytes: long blocks, so that every multiprocessor has its share of loads in flight;
//! of integers of 4 bits: narrow tiles, which are more. Those take blocks of 16 warps where that
//! many have long slices, or where a block a tile fills the chip.
StoredPlanShape shapeOf(WeightType type, int32_t channels, int32_t tiles,
                        DeviceTraits const& device) {
    int32_t const mostBlocks = tiles * (device.computeCapability >= 90 ? kMAX_CLUSTER : 1);
    if (isNarrow(type)) {
        bool const isFew = mostBlocks < 2 * device.multiprocessors;
        bool const isFull =
            tiles <= device.multiprocessors && 4 * tiles > 3 * device.multiprocessors;
        if (isFull || (isFew && channels >= kLONG)) {
            return {16, 4};
        }
        return isFew ? StoredPlanShape{8, 8} : StoredPlanShape{8, 4};
    }
    return mostBlocks < 3 * device.multiprocessors ? StoredPlanShape{8, 8} : StoredPlanShape{4, 8};
}

//! The largest cluster with which all blocks run at once, of `room`. A cluster lies within one of
//! the chip's processing clusters, of which large ones leave more unused: on an H200, with room for
//! 264 blocks, 256 in eights took a third longer than 192 in sixes.
int32_t clusterOf(int32_t tiles, int32_t room, int32_t most) {
    for (int32_t cluster = most; cluster > 1; --cluster) {
        int32_t const usable = cluster > 4 ? room * 3 / 4 : room * 7 / 8;
        if (tiles * cluster <= usable) {
            return cluster;
        }
    }
    return 1;
}

//! The smallest cluster whose warps take no more turns of 64 channels than this one's.
int32_t shortened(int32_t cluster, int32_t channels, int32_t warps) {
    auto const turns = [&](int32_t blocks) {
        return (channels + 64 * warps * blocks - 1) / (64 * warps * blocks);
    };
    while (cluster > 1 && turns(cluster - 1) == turns(cluster)) {
        --cluster;
    }
    return cluster;
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
    bool const hasOneToken = args.tokens <= kMAX_PRUNED_TOKENS;
    int32_t const wide = 8 * vectorOf(args.stored.type);
    auto const tilesOf = [&](int32_t columns) { return (args.outputs + columns - 1) / columns; };
    int32_t const splits = device.computeCapability >= 90 ? kMAX_CLUSTER : 1;
    StoredPlanShape const shape =
        hasOneToken ? shapeOf(args.stored.type, args.channels, tilesOf(wide), device)
                    : kEIGHT_TOKENS;
    bool const isHalved = isNarrow(args.stored.type) && hasOneToken && shape.unroll == 8;
    int32_t const tiles = tilesOf(isHalved ? wide / 2 : wide);
    int32_t const resident = residentStoredWarps(args.stored.type, hasOneToken);
    int32_t const useful = std::max(args.channels / (shape.warps * 32), 1);
    DecodePlan plan{};
    plan.lanesPerRow = 8;
    plan.warps = shape.warps;
    plan.unroll = shape.unroll;
    plan.overlap = 1;
    plan.residentWarps = resident;
    plan.cluster = clusterOf(tiles, device.multiprocessors * (resident / shape.warps),
                             std::min(splits, useful));
    if (isNarrow(args.stored.type) && shape.warps < 16) {
        plan.cluster = shortened(plan.cluster, args.channels, shape.warps);
    }
    // Of half of a short slice's rows a batch of 32 leaves many over.
    bool const isSparse = args.isPruned || args.selection.n < args.selection.m;
    if (isSparse && hasOneToken && !isNarrow(args.stored.type) && shape.warps == 8 &&
        args.channels < 96 * shape.warps * plan.cluster) {
        plan.unroll = 4;
    }
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
