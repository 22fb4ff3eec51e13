// Gated activations: as they are, and pruned for few and for many tokens.
#pragma once

#include <cuda_pipeline.h>

#include "between_common.cuh"
#include "prune_groups.cuh"
#include "prune_row.cuh"

namespace nmexport::cuda::between {

constexpr int kGROUP_THREADS = 128;  // a group each

__device__ __forceinline__ float gated(float gate, float up) {
    return __fdividef(gate, 1.0F + __expf(-gate)) * up;
}

template <typename T>
__global__ void __launch_bounds__(kTHREADS) gatedSiluKernel(GatedSiluArgs args, int64_t pieces) {
    allowDependentLaunch();
    waitForPredecessors();
    int64_t const piece = static_cast<int64_t>(blockIdx.x) * kTHREADS + threadIdx.x;
    if (piece >= pieces) {
        return;
    }
    int64_t const perToken = args.channels / kELEMENTS;
    int64_t const token = piece / perToken;
    int64_t const channel = piece % perToken * kELEMENTS;
    int64_t const start = token * args.stride + channel;
    Eight<T> gate = Eight<T>::load(static_cast<T const*>(args.gate) + start);
    Eight<T> const up = Eight<T>::load(static_cast<T const*>(args.up) + start);
#pragma unroll
    for (int i = 0; i < kELEMENTS; ++i) {
        gate.value[i] = gated(gate.value[i], up.value[i]);
    }
    gate.store(static_cast<T*>(args.y) + token * args.channels + channel);
}

//! Eight neighbouring values of a 16-bit type.
template <typename T>
__device__ __forceinline__ uint4 gatedEight(Eight<T> gate, Eight<T> const& up) {
#pragma unroll
    for (int i = 0; i < kELEMENTS; ++i) {
        gate.value[i] = gated(gate.value[i], up.value[i]);
    }
    return gate.packed();
}

//! Few tokens, pruned: a lane gathers, gates and ranks two positions; blockIdx.y is the token.
template <typename T, bool IS_BARE>
__global__ void __launch_bounds__(kPAIR_THREADS) gatedPairKernel(GatedSiluArgs const args) {
    allowDependentLaunch();
    int32_t const position = 2 * static_cast<int32_t>(blockIdx.x * kPAIR_THREADS + threadIdx.x);
    bool const isActive = position < args.channels;
    PairConstants const constants =
        PairConstants::read<IS_BARE>(args.selection, isActive ? position : 0);
    waitForPredecessors();
    int64_t const token = blockIdx.y;
    T const* const gate = static_cast<T const*>(args.gate) + token * args.stride;
    T const* const up = static_cast<T const*>(args.up) + token * args.stride;
    int32_t const channels[2] = {constants.channel.x, constants.channel.y};
    float gates[2];
    float ups[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        gates[i] = loadActivation(gate + channels[i]);
        ups[i] = loadActivation(up + channels[i]);
    }
    uint32_t const word =
        packWord(fromFloat<T>(gated(gates[0], ups[0])), fromFloat<T>(gated(gates[1], ups[1])));
    uint32_t const pruned = prunePair<T, IS_BARE>(args.selection, constants, word);
    if (isActive) {
        T* const y = static_cast<T*>(args.y) + token * args.channels;
        reinterpret_cast<uint32_t*>(y)[position / 2] = pruned;
    }
}

//! What a lane keeps in shared memory for itself: its halves of the rows that come next.
template <int ROWS>
struct NextGroups {
    uint4 gate[ROWS][2][kGROUP_THREADS];
    uint4 up[ROWS][2][kGROUP_THREADS];

    //! Asks for rows `token` and behind it, none beyond `last`.
    template <typename T>
    __device__ void ask(GatedSiluArgs const& args, int64_t token, int64_t last,
                        int32_t firstGroup) {
#pragma unroll
        for (int row = 0; row < ROWS; ++row) {
#pragma unroll
            for (int part = 0; part < 2; ++part) {
                int32_t const octet =
                    min(octetOfLane(firstGroup) + 2 * part, args.channels / kELEMENTS - 1);
                int64_t const at = min(token + row, last) * args.stride + octet * kELEMENTS;
                __pipeline_memcpy_async(&gate[row][part][threadIdx.x],
                                        static_cast<T const*>(args.gate) + at, sizeof(uint4));
                __pipeline_memcpy_async(&up[row][part][threadIdx.x],
                                        static_cast<T const*>(args.up) + at, sizeof(uint4));
            }
        }
        __pipeline_commit();
    }

    //! The lane's group of such a row.
    template <typename T>
    __device__ Group gated(int row) const {
        Group halves;
#pragma unroll
        for (int part = 0; part < 2; ++part) {
            halves.half[part] = gatedEight<T>(Eight<T>::of(gate[row][part][threadIdx.x]),
                                              Eight<T>::of(up[row][part][threadIdx.x]));
        }
        return exchanged(halves);
    }
};

//! Many tokens, pruned, with no order: a lane makes and ranks its group of `rows` of them, number
//! blockIdx.y. While it ranks one, the next is on its way.
template <typename T, typename PRUNER>
__global__ void __launch_bounds__(kGROUP_THREADS, 4)
    gatedGroupKernel(GatedSiluArgs const args, int32_t rows) {
    __shared__ NextGroups<PRUNER::ROWS> next;
    allowDependentLaunch();
    int32_t const groups = args.channels / kGROUP;
    int32_t const lane = static_cast<int32_t>(threadIdx.x) % kWARP;
    int32_t const first = static_cast<int32_t>(blockIdx.x * kGROUP_THREADS + threadIdx.x) - lane;
    if (first >= groups) {
        return;
    }
    PRUNER const pruner(args.selection, min(first + lane, groups - 1));
    waitForPredecessors();
    int64_t const begin = static_cast<int64_t>(blockIdx.y) * rows;
    int64_t const last = min(begin + rows, args.tokens) - 1;
    next.template ask<T>(args, begin, last, first);
    for (int64_t token = begin; token <= last; token += PRUNER::ROWS) {
        __pipeline_wait_prior(0);
        Group some[PRUNER::ROWS];
#pragma unroll
        for (int i = 0; i < PRUNER::ROWS; ++i) {
            some[i] = next.template gated<T>(i);
        }
        if (token + PRUNER::ROWS <= last) {
            next.template ask<T>(args, token + PRUNER::ROWS, last, first);
        }
        pruner.prune(some);
#pragma unroll
        for (int i = 0; i < PRUNER::ROWS; ++i) {
            // The last row may be there twice: the same values go to the same place.
            int64_t const row = min(token + i, last) * args.channels;
            storeGroups(static_cast<T*>(args.y) + row, some[i], first, args.channels);
        }
    }
}

//! Many tokens, pruned, in an order: a block makes `rows` of them, and ranks them together.
template <typename T, typename PRUNER>
__global__ void __launch_bounds__(kMANY_THREADS, 2)
    gatedRowsKernel(GatedSiluArgs const args, int32_t rows) {
    extern __shared__ __align__(16) unsigned char rowBytes[];
    auto* const staged = reinterpret_cast<uint4*>(rowBytes);
    allowDependentLaunch();
    askFor(args.selection, args.channels);
    waitForPredecessors();
    int64_t const begin = static_cast<int64_t>(blockIdx.x) * rows;
    int const count = static_cast<int>(min(static_cast<int64_t>(rows), args.tokens - begin));
    int32_t const octets = args.channels / kELEMENTS;
    for (int row = 0; row < count; ++row) {
#pragma unroll 4
        for (int32_t octet = threadIdx.x; octet < octets; octet += kMANY_THREADS) {
            int64_t const at = (begin + row) * args.stride + octet * kELEMENTS;
            staged[row * octets + octet] =
                gatedEight(Eight<T>::load(static_cast<T const*>(args.gate) + at),
                           Eight<T>::load(static_cast<T const*>(args.up) + at));
        }
    }
    __syncthreads();
    pruneStaged<T, PRUNER>(staged, count, args.selection, args.channels,
                           static_cast<T*>(args.y) + begin * args.channels);
}

}  // namespace nmexport::cuda::between
