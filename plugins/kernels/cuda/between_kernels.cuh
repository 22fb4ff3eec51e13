// The kernels between the linears: norms, gated activations, the pruning of a few rows.
#pragma once

#include <cuda_pipeline.h>

#include "between.h"
#include "device_primitives.cuh"
#include "element.cuh"
#include "prune_groups.cuh"
#include "prune_row.cuh"

namespace nmexport::cuda::between {

//! Threads of a block: 8 elements each are a token of 4096 channels in one go; and of a block that
//! shares its multiprocessor with others.
constexpr int kTHREADS = 512;
constexpr int kMANY_THREADS = 256;
constexpr int kWARPS = kTHREADS / kWARP;
constexpr int kPAIR_THREADS = 128;   // 2 elements each: many blocks for one token
constexpr int kGROUP_THREADS = 128;  // a group each

//! Up to so many tokens a pruned row is ranked two positions a lane, over many blocks.
constexpr int64_t kFEW_TOKENS = 16;
constexpr int kELEMENTS = 8;  // a thread takes at a time: 16 bytes of a 16-bit type

//! Eight neighbouring elements as float32.
template <typename T>
struct Eight {
    float value[kELEMENTS];

    __device__ static Eight load(T const* from) {
        Eight eight;
        constexpr int kVECTORS = kELEMENTS / kVECTOR<T>;
#pragma unroll
        for (int v = 0; v < kVECTORS; ++v) {
            Unpacked<T> const part = unpack(loadActivationVector(from + v * kVECTOR<T>), from);
#pragma unroll
            for (int i = 0; i < kVECTOR<T>; ++i) {
                eight.value[v * kVECTOR<T> + i] = part.value[i];
            }
        }
        return eight;
    }

    //! Of 16 bytes of a 16-bit type.
    __device__ static Eight of(uint4 raw) {
        static_assert(sizeof(T) == 2);
        Eight eight;
        Unpacked<T> const values = unpack(raw, static_cast<T const*>(nullptr));
#pragma unroll
        for (int i = 0; i < kELEMENTS; ++i) {
            eight.value[i] = values.value[i];
        }
        return eight;
    }

    //! Adds others, rounded to T.
    __device__ void add(Eight const& other) {
#pragma unroll
        for (int i = 0; i < kELEMENTS; ++i) {
            value[i] = toFloat<T>(fromFloat<T>(value[i] + other.value[i]));
        }
    }

    //! Fused, in one order whatever the block: the sum's bits are the same.
    __device__ void addSquares(float& squares) const {
#pragma unroll
        for (int i = 0; i < kELEMENTS; ++i) {
            squares = fmaf(value[i], value[i], squares);
        }
    }

    __device__ void normalise(float factor, Eight const& weight) {
#pragma unroll
        for (int i = 0; i < kELEMENTS; ++i) {
            value[i] = toFloat<T>(fromFloat<T>(value[i] * factor)) * weight.value[i];
        }
    }

    __device__ void store(T* to) const {
        alignas(16) T elements[kELEMENTS];
        round(elements);
#pragma unroll
        for (int v = 0; v < kELEMENTS / kVECTOR<T>; ++v) {
            reinterpret_cast<uint4*>(to)[v] = reinterpret_cast<uint4 const*>(elements)[v];
        }
    }

    //! All of them in 16 bytes, of a 16-bit type.
    __device__ uint4 packed() const {
        static_assert(sizeof(T) == 2);
        alignas(16) T elements[kELEMENTS];
        round(elements);
        return *reinterpret_cast<uint4 const*>(elements);
    }

  private:
    __device__ void round(T (&elements)[kELEMENTS]) const {
#pragma unroll
        for (int i = 0; i < kELEMENTS; ++i) {
            elements[i] = fromFloat<T>(value[i]);
        }
    }
};

//! Asks for a constant array before the wait for the kernel ahead: it left the cache a step ago.
__device__ __forceinline__ void askFor(void const* data, int64_t bytes) {
    if (data == nullptr) {
        return;
    }
    constexpr int64_t kLINE = 128;
    for (int64_t at = threadIdx.x * kLINE; at < bytes; at += blockDim.x * kLINE) {
        prefetchToL2(static_cast<char const*>(data) + at);
    }
}

__device__ __forceinline__ void askFor(Selection const& selection, int32_t channels) {
    int64_t const bytes = 4 * static_cast<int64_t>(channels);
    askFor(selection.channelOrder, bytes);
    askFor(selection.scoreScale, bytes);
    askFor(selection.valueScale, bytes);
    askFor(selection.shift, 4 * static_cast<int64_t>(selection.shiftLength));
}

//! Sum over the block; every thread gets it. A thread's parts are what PARTS threads of a larger
//! block would have, and are added in that block's order: the sum's bits do not depend on its size.
template <int PARTS>
__device__ float sumOverBlock(float const (&parts)[PARTS], float* perWarp) {
    int const warps = static_cast<int>(blockDim.x) / kWARP;
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
        float value = parts[part];
#pragma unroll
        for (int offset = kWARP / 2; offset > 0; offset /= 2) {
            value += __shfl_xor_sync(kWHOLE_WARP, value, offset);
        }
        if (threadIdx.x % kWARP == 0) {
            perWarp[part * warps + static_cast<int>(threadIdx.x) / kWARP] = value;
        }
    }
    __syncthreads();
    float sum = 0.0F;
#pragma unroll
    for (int warp = 0; warp < kWARPS; ++warp) {
        sum += perWarp[warp];
    }
    return sum;
}

//! A block per token. The rounded sum is kept in registers for up to HELD * kTHREADS * 8 channels;
//! what lies beyond is read again.
template <typename T, Pruner PRUNER, int HELD, int AT_ONCE = 4>
__global__ void __launch_bounds__(kTHREADS) normKernel(NormArgs const args) {
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

//! Runs of 8 channels that a thread has of a row that some rows share a block for.
constexpr int kOCTETS = 2;

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
template <typename T, int THREADS>
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
    GroupPruner<T, false> const pruner(args.selection, group);
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
template <typename T, bool IS_HALF_BARE>
__global__ void __launch_bounds__(kGROUP_THREADS, 4)
    gatedGroupKernel(GatedSiluArgs const args, int32_t rows) {
    using Pruner = GroupPruner<T, IS_HALF_BARE>;
    __shared__ NextGroups<Pruner::ROWS> next;
    allowDependentLaunch();
    int32_t const groups = args.channels / kGROUP;
    int32_t const lane = static_cast<int32_t>(threadIdx.x) % kWARP;
    int32_t const first = static_cast<int32_t>(blockIdx.x * kGROUP_THREADS + threadIdx.x) - lane;
    if (first >= groups) {
        return;
    }
    Pruner const pruner(args.selection, min(first + lane, groups - 1));
    waitForPredecessors();
    int64_t const begin = static_cast<int64_t>(blockIdx.y) * rows;
    int64_t const last = min(begin + rows, args.tokens) - 1;
    next.template ask<T>(args, begin, last, first);
    for (int64_t token = begin; token <= last; token += Pruner::ROWS) {
        __pipeline_wait_prior(0);
        Group some[Pruner::ROWS];
#pragma unroll
        for (int i = 0; i < Pruner::ROWS; ++i) {
            some[i] = next.template gated<T>(i);
        }
        if (token + Pruner::ROWS <= last) {
            next.template ask<T>(args, token + Pruner::ROWS, last, first);
        }
        pruner.prune(some);
#pragma unroll
        for (int i = 0; i < Pruner::ROWS; ++i) {
            // The last row may be there twice: the same values go to the same place.
            int64_t const row = min(token + i, last) * args.channels;
            storeGroups(static_cast<T*>(args.y) + row, some[i], first, args.channels);
        }
    }
}

//! Many tokens, pruned, in an order: a block makes `rows` of them, and ranks them together.
template <typename T, bool IS_HALF_BARE>
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
    pruneStaged<T, IS_HALF_BARE>(staged, count, args.selection, args.channels,
                                 static_cast<T*>(args.y) + begin * args.channels);
}

//! Rows that some other kernel has made, many: a block takes row after row, as normRowsKernel does.
template <typename T, int THREADS>
__global__ void __launch_bounds__(THREADS, 2 * kMANY_THREADS / THREADS)
    pruneRowsKernel(MaskArgs const args) {
    __shared__ uint4 staged[2][THREADS * kOCTETS];
    allowDependentLaunch();
    int32_t const octets = args.channels / kELEMENTS;
    int32_t const groups = args.channels / kGROUP;
    int32_t const firstGroup = static_cast<int32_t>(threadIdx.x) / kWARP * kWARP;
    int32_t const group = min(static_cast<int32_t>(threadIdx.x), groups - 1);
    GroupOrder const order(args.selection.channelOrder, group);
    GroupPruner<T, false> const pruner(args.selection, group);
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
