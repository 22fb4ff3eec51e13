// Shared memory of a decode kernel's CTA as arithmetic: the host asks it which plans a chip can
// run, the kernels are held to it at compile time.
#pragma once

#include "nm_cuda.h"

namespace nmexport::cuda {

//! Channels that a warp holds ready to rank in shared memory at a time: four loads in flight per
//! lane and token.
inline constexpr int kWINDOW = 128;

//! Four float64 sums of which the variance correction is made.
inline constexpr size_t kMOMENTS_BYTES = 32;

//! What fixes the shared memory of a decode kernel, beside the size of its cluster.
struct DecodeFootprint {
    int32_t tokens;
    int32_t columns;  //!< that a CTA sums up
    int32_t warps;
    size_t scratchBytes;  //!< of one warp
};

//! Queue entries of a warp: they hold the batch in flight, the one being queued and the overshoot
//! of one chunk.
constexpr int32_t ringEntries(int32_t batch) {
    return batch <= 32 ? 128 : 256;
}

//! A queued row and what each token multiplies it with.
constexpr size_t keptBytes(int32_t tokens) {
    return tokens == 1
               ? 8
               : (sizeof(int32_t) + sizeof(float) * static_cast<size_t>(tokens) + 15) / 16 * 16;
}

//! One warp's window of keys and values, and its queue.
constexpr size_t warpScratchBytes(int32_t tokens, int32_t batch) {
    size_t const window = (sizeof(uint32_t) + sizeof(float)) * static_cast<size_t>(tokens);
    return window * kWINDOW + keptBytes(tokens) * static_cast<size_t>(ringEntries(batch));
}

//! Shared memory of one CTA; `cluster` CTAs send their sums to rank 0.
constexpr size_t decodeSharedBytes(DecodeFootprint const& footprint, int32_t cluster) {
    size_t const tokens = static_cast<size_t>(footprint.tokens);
    size_t const warps = static_cast<size_t>(footprint.warps);
    size_t const ranks = static_cast<size_t>(cluster);
    size_t const mailbox = sizeof(uint64_t) * 2;
    size_t const scratch = footprint.scratchBytes * warps;
    size_t const moments = kMOMENTS_BYTES * tokens * (warps + ranks);
    size_t const sums = sizeof(float) * tokens * static_cast<size_t>(footprint.columns) * ranks;
    size_t const means = sizeof(float) * tokens * (warps + 1);
    return mailbox + scratch + moments + sums + means;
}

//! The largest cluster up to `wanted` whose CTAs fit into `sharedBytesPerBlock`; 0 where not even a
//! lone CTA does.
constexpr int32_t fittingCluster(DecodeFootprint const& footprint, int32_t wanted,
                                 int32_t sharedBytesPerBlock) {
    int32_t cluster = wanted;
    while (cluster > 0 &&
           decodeSharedBytes(footprint, cluster) > static_cast<size_t>(sharedBytesPerBlock)) {
        --cluster;
    }
    return cluster;
}

//! What a plan's kernel takes.
constexpr DecodeFootprint footprintOf(DecodePlan const& plan, DType type, int32_t tokens) {
    int32_t const elements = type == DType::kFLOAT32 ? 4 : 8;  // in 16 bytes
    int32_t const batch = plan.unroll / plan.vectors * (32 / plan.lanesPerRow);
    return {tokens, plan.lanesPerRow * plan.vectors * elements, plan.warps,
            warpScratchBytes(tokens, batch)};
}

}  // namespace nmexport::cuda
