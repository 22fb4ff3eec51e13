// Rows that some other kernel has made, pruned in the chain: the attention's output.
#pragma once

#include <cuda_pipeline.h>

#include "between_common.cuh"
#include "prune_groups.cuh"
#include "prune_row.cuh"

namespace nmexport::cuda::between {

//! Rows that some other kernel has made, many: a block takes row after row, as normRowsKernel does.
template <typename T, int THREADS, typename PRUNER>
__global__ void __launch_bounds__(THREADS, 2 * kMANY_THREADS / THREADS)
    pruneRowsKernel(MaskArgs const args) {
    __shared__ uint4 staged[2][THREADS * kOCTETS];
    allowDependentLaunch();
    int32_t const octets = args.channels / kELEMENTS;
    int32_t const groups = args.channels / kGROUP;
    int32_t const firstGroup = static_cast<int32_t>(threadIdx.x) / kWARP * kWARP;
    int32_t const group = min(static_cast<int32_t>(threadIdx.x), groups - 1);
    GroupOrder const order(args.selection.channelOrder, group);
    PRUNER const pruner(args.selection, group);
    auto const ask = [&](int64_t token, int buffer) {
        for (int32_t octet = static_cast<int32_t>(threadIdx.x); octet < octets; octet += THREADS) {
            __pipeline_memcpy_async(&staged[buffer][octet],
                                    static_cast<uint4 const*>(args.x) + token * octets + octet,
                                    sizeof(uint4));
        }
        __pipeline_commit();
    };
    waitForPredecessors();
    ask(blockIdx.x, 0);
    int buffer = 0;
    for (int64_t token = blockIdx.x; token < args.tokens; token += gridDim.x, buffer ^= 1) {
        __pipeline_wait_prior(0);
        __syncthreads();  // this row is there, and the one before is ranked
        if (token + gridDim.x < args.tokens) {
            ask(token + gridDim.x, buffer ^ 1);
        }
        if (firstGroup < groups) {
            Group own[1] = {order.of(reinterpret_cast<uint16_t const*>(staged[buffer]))};
            pruner.prune(own);
            storeGroups(static_cast<T*>(args.s) + token * args.channels, own[0], firstGroup,
                        args.channels);
        }
    }
}

//! A few rows that some other kernel has made: a lane gathers and ranks two positions.
template <typename T, bool IS_BARE>
__global__ void __launch_bounds__(kPAIR_THREADS) prunePairKernel(MaskArgs const args) {
    allowDependentLaunch();
    int32_t const position = 2 * static_cast<int32_t>(blockIdx.x * kPAIR_THREADS + threadIdx.x);
    bool const isActive = position < args.channels;
    PairConstants const constants =
        PairConstants::read<IS_BARE>(args.selection, isActive ? position : 0);
    waitForPredecessors();
    int64_t const start = static_cast<int64_t>(blockIdx.y) * args.channels;
    T const* const x = static_cast<T const*>(args.x) + start;
    uint32_t const word = loadActivationBits(x + constants.channel.x) |
                          loadActivationBits(x + constants.channel.y) << 16;
    uint32_t const pruned = prunePair<T, IS_BARE>(args.selection, constants, word);
    if (isActive) {
        reinterpret_cast<uint32_t*>(static_cast<T*>(args.s) + start)[position / 2] = pruned;
    }
}

}  // namespace nmexport::cuda::between
