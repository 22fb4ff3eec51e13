// Norms of a residual sum, and of many tokens pruned.
#pragma once

#include <cuda_pipeline.h>

#include "between_common.cuh"
#include "prune_groups.cuh"
#include "prune_row.cuh"

namespace nmexport::cuda::between {

//! A block per token. The rounded sum is kept in registers for up to HELD * kTHREADS * 8 channels;
//! what lies beyond is read again.
template <typename T, Pruner PRUNER, int HELD, int AT_ONCE = 4>
__global__ void __launch_bounds__(kTHREADS, 1) normKernel(NormArgs const args) {
    __shared__ float perWarp[kWARPS];
    extern __shared__ __align__(16) unsigned char rowBytes[];
    allowDependentLaunch();
    askFor(args.weight, args.channels * static_cast<int64_t>(sizeof(T)));
    auto* const staged = reinterpret_cast<uint4*>(rowBytes);
    StagedRow<T, PRUNER, kTHREADS, AT_ONCE> row(staged, args.selection, args.channels);
    if constexpr (PRUNER != Pruner::kNONE) {
        askFor(args.selection, args.channels);
        row.prepare();
    }
    waitForPredecessors();
    int64_t const start = static_cast<int64_t>(blockIdx.x) * args.channels;
    T const* const x = static_cast<T const*>(args.x) + start;
    T const* const skip = args.skip == nullptr ? nullptr : static_cast<T const*>(args.skip) + start;
    T* const total = args.sum == nullptr ? nullptr : static_cast<T*>(args.sum) + start;
    auto const summed = [&](int32_t channel) {
        Eight<T> sum = Eight<T>::load(x + channel);
        if (skip != nullptr) {
            sum.add(Eight<T>::load(skip + channel));
        }
        return sum;
    };
    Eight<T> held[HELD];
    float squares[1] = {};
    int step = 0;
    for (int32_t channel = static_cast<int32_t>(threadIdx.x) * kELEMENTS; channel < args.channels;
         channel += kTHREADS * kELEMENTS, ++step) {
        Eight<T> const sum = summed(channel);
        sum.addSquares(squares[0]);
        if (total != nullptr && blockIdx.y == 0) {
            sum.store(total + channel);
        }
#pragma unroll
        for (int h = 0; h < HELD; ++h) {
            if (step == h) {
                held[h] = sum;
            }
        }
    }
    float const mean = sumOverBlock(squares, perWarp) / static_cast<float>(args.channels);
    float const factor = rsqrtf(mean + args.epsilon);
    T const* const weight = static_cast<T const*>(args.weight);
    T* const y = static_cast<T*>(args.y) + start;
    step = 0;
    for (int32_t channel = static_cast<int32_t>(threadIdx.x) * kELEMENTS; channel < args.channels;
         channel += kTHREADS * kELEMENTS, ++step) {
        Eight<T> sum;
        if (step >= HELD) {
            sum = summed(channel);
        }
#pragma unroll
        for (int h = 0; h < HELD; ++h) {
            if (step == h) {
                sum = held[h];
            }
        }
        sum.normalise(factor, Eight<T>::load(weight + channel));
        if constexpr (PRUNER == Pruner::kNONE) {
            sum.store(y + channel);
        } else {
            staged[channel / kELEMENTS] = sum.packed();
        }
    }
    if constexpr (PRUNER != Pruner::kNONE) {
        __syncthreads();
        row.prune(y);
    }
}

//! What a thread keeps in shared memory for itself: its part of the next row, which is on its way,
//! and of the weight.
template <int THREADS>
struct NextRow {
    uint4 x[kOCTETS][THREADS];
    uint4 skip[kOCTETS][THREADS];
    uint4 weight[kOCTETS][THREADS];

    //! The number of a thread's i-th run.
    __device__ static int32_t octetOf(int i) {
        return static_cast<int32_t>(threadIdx.x) + i * THREADS;
    }

    __device__ void keepWeight(NormArgs const& args) {
        int32_t const last = args.channels / kELEMENTS - 1;
#pragma unroll
        for (int i = 0; i < kOCTETS; ++i) {
            weight[i][threadIdx.x] =
                __ldg(static_cast<uint4 const*>(args.weight) + min(octetOf(i), last));
        }
    }

    __device__ void ask(NormArgs const& args, int64_t token) {
        int32_t const octets = args.channels / kELEMENTS;
#pragma unroll
        for (int i = 0; i < kOCTETS; ++i) {
            int64_t const at = token * octets + min(octetOf(i), octets - 1);
            __pipeline_memcpy_async(&x[i][threadIdx.x], static_cast<uint4 const*>(args.x) + at,
                                    sizeof(uint4));
            if (args.skip != nullptr) {
                __pipeline_memcpy_async(&skip[i][threadIdx.x],
                                        static_cast<uint4 const*>(args.skip) + at, sizeof(uint4));
            }
        }
        __pipeline_commit();
    }
};

//! Many tokens, pruned: a block takes row after row. While it ranks one, the next is on its way,
//! and what ranks a thread's group stays in registers. A group a thread, so K <= 16 * THREADS.
template <typename T, int THREADS, typename PRUNER>
__global__ void __launch_bounds__(THREADS, 2 * kMANY_THREADS / THREADS)
    normRowsKernel(NormArgs const args) {
    constexpr int kPARTS = kTHREADS / THREADS;
    __shared__ float perWarp[kWARPS];
    extern __shared__ __align__(16) unsigned char rowBytes[];
    auto& next = *reinterpret_cast<NextRow<THREADS>*>(rowBytes);
    auto* const staged = reinterpret_cast<uint4*>(rowBytes + sizeof(next));
    allowDependentLaunch();
    int32_t const octets = args.channels / kELEMENTS;
    int32_t const groups = args.channels / kGROUP;
    int32_t const firstGroup = static_cast<int32_t>(threadIdx.x) / kWARP * kWARP;
    int32_t const group = min(static_cast<int32_t>(threadIdx.x), groups - 1);
    GroupOrder const order(args.selection.channelOrder, group);
    PRUNER const pruner(args.selection, group);
    next.keepWeight(args);
    waitForPredecessors();
    next.ask(args, blockIdx.x);
    for (int64_t token = blockIdx.x; token < args.tokens; token += gridDim.x) {
        __pipeline_wait_prior(0);
        Eight<T> sums[kOCTETS];
        float squares[kPARTS] = {};
#pragma unroll
        for (int i = 0; i < kOCTETS; ++i) {
            sums[i] = Eight<T>::of(next.x[i][threadIdx.x]);
            if (args.skip != nullptr) {
                sums[i].add(Eight<T>::of(next.skip[i][threadIdx.x]));
            }
            int32_t const octet = next.octetOf(i);
            if (octet < octets) {
                sums[i].addSquares(squares[i % kPARTS]);
                if (args.sum != nullptr) {
                    sums[i].store(static_cast<T*>(args.sum) + (token * octets + octet) * kELEMENTS);
                }
            }
        }
        if (token + gridDim.x < args.tokens) {
            next.ask(args, token + gridDim.x);
        }
        float const mean = sumOverBlock(squares, perWarp) / static_cast<float>(args.channels);
        float const factor = rsqrtf(mean + args.epsilon);
#pragma unroll
        for (int i = 0; i < kOCTETS; ++i) {
            sums[i].normalise(factor, Eight<T>::of(next.weight[i][threadIdx.x]));
            staged[next.octetOf(i)] = sums[i].packed();
        }
        __syncthreads();
        if (firstGroup < groups) {
            Group own[1] = {order.of(reinterpret_cast<uint16_t const*>(staged))};
            pruner.prune(own);
            storeGroups(static_cast<T*>(args.y) + token * args.channels, own[0], firstGroup,
                        args.channels);
        }
    }
}

}  // namespace nmexport::cuda::between
