// Partial sums of a tile meet: over the warps of a CTA in shared memory, then over the cluster
// through distributed shared memory, always in index order.
//
//     rank 0      warps -> sums --.
//     rank 1      warps -> sums --+--> rankSums of rank 0 -> y
//     ...                         |
#pragma once

#include "decode_memory.h"
#include "device_primitives.cuh"
#include "element.cuh"
#include "nm_cuda.h"
#include "warp.cuh"

namespace nmexport::cuda {

//! The pieces of a CTA's shared memory; their sum is decodeSharedBytes.
template <typename Shape>
struct DecodeShared {
    __device__ explicit DecodeShared(unsigned char* base, int cluster)
        : mailbox{reinterpret_cast<uint64_t*>(base)},
          scratch{reinterpret_cast<typename Shape::Scratch*>(base + 2 * sizeof(uint64_t))},
          warpMoments{reinterpret_cast<Moments*>(scratch + Shape::WARPS)},
          rankMoments{warpMoments + Shape::TOKENS * Shape::WARPS},
          rankSums{reinterpret_cast<float*>(rankMoments + Shape::TOKENS * cluster)},
          eta{rankSums + Shape::TOKENS * Shape::COLUMNS * cluster},
          warpMeans{eta + Shape::TOKENS} {}

    uint64_t* mailbox;                 //!< counts what the ranks send, in rank 0
    typename Shape::Scratch* scratch;  //!< [WARPS]
    Moments* warpMoments;              //!< [WARPS][TOKENS]
    Moments* rankMoments;              //!< [cluster][TOKENS], filled by the other ranks
    float* rankSums;                   //!< [cluster][TOKENS][COLUMNS], filled by the other ranks
    float* eta;                        //!< [TOKENS]
    float* warpMeans;                  //!< [WARPS][TOKENS]
};

//! Sum over the CTA's warps of two neighbouring ones of its TOKENS * COLUMNS values.
template <typename Shape>
__device__ __forceinline__ float2 sumOverWarps(typename Shape::Scratch const* scratch, int pair) {
    float2 sum = make_float2(0.0F, 0.0F);
#pragma unroll
    for (int warp = 0; warp < Shape::WARPS; ++warp) {
        float2 const part = reinterpret_cast<float2 const*>(scratch + warp)[pair];
        sum.x += part.x;
        sum.y += part.y;
    }
    return sum;
}

//! Bytes that rank 0 gets from all ranks.
template <typename Shape>
__device__ __forceinline__ uint32_t mailBytes(int cluster) {
    return static_cast<uint32_t>(cluster) *
           (sizeof(float) * Shape::TOKENS * Shape::COLUMNS +
            (Shape::MOMENTS ? sizeof(Moments) * Shape::TOKENS : 0));
}

//! Sends this CTA's sums and moments to rank 0 of its cluster, or leaves them in place where the
//! CTA is alone.
template <typename Shape>
__device__ __forceinline__ void sendSums(DecodeShared<Shape> const& shared, uint32_t rank,
                                         bool isAlone) {
    constexpr int kPAIRS = Shape::TOKENS * Shape::COLUMNS / 2;
    auto const send = [&](uint64_t* local, uint64_t value) {
        if (isAlone) {
            *local = value;
        } else {
            sendToRankZero(local, value, shared.mailbox);
        }
    };
    uint64_t* const target = reinterpret_cast<uint64_t*>(shared.rankSums) + rank * kPAIRS;
    for (int pair = threadIdx.x; pair < kPAIRS; pair += Shape::THREADS) {
        float2 const sum = sumOverWarps<Shape>(shared.scratch, pair);
        uint64_t const bits =
            static_cast<uint64_t>(__float_as_uint(sum.y)) << 32 | __float_as_uint(sum.x);
        send(target + pair, bits);
    }
    if (Shape::MOMENTS && threadIdx.x < Shape::TOKENS) {
        Moments total;
        for (int warp = 0; warp < Shape::WARPS; ++warp) {
            total.addMoments(shared.warpMoments[warp * Shape::TOKENS + threadIdx.x]);
        }
        uint64_t* const own =
            reinterpret_cast<uint64_t*>(shared.rankMoments + rank * Shape::TOKENS + threadIdx.x);
        double const parts[4] = {total.all, total.allSquared, total.kept, total.keptSquared};
        for (int i = 0; i < 4; ++i) {
            send(own + i, static_cast<uint64_t>(__double_as_longlong(parts[i])));
        }
    }
}

//! Brings the sums of all warps of the cluster to rank 0, in its rankSums; true there. `rank` and
//! `cluster` are this CTA's; the mailbox is open where the cluster has several.
template <typename Shape>
__device__ __forceinline__ bool gatherSums(DecodeShared<Shape> const& shared, uint32_t rank,
                                           int cluster) {
    bool const isAlone = cluster == 1;
    __syncthreads();
    if (!isAlone) {
        if (rank == 0 && threadIdx.x == 0) {
            expectMail(shared.mailbox, mailBytes<Shape>(cluster));
        }
        __syncwarp();
        waitForOpenMailbox();
    }
    sendSums<Shape>(shared, rank, isAlone);
    if (rank != 0) {
        return false;
    }
    if (isAlone) {
        __syncthreads();
    } else {
        waitForMail(shared.mailbox);
    }
    return true;
}

//! One value of rankSums over the ranks, in order.
template <typename Shape>
__device__ __forceinline__ float sumOverRanks(DecodeShared<Shape> const& shared, int index,
                                              int cluster) {
    float sum = 0.0F;
    for (int rank = 0; rank < cluster; ++rank) {
        sum += shared.rankSums[rank * (Shape::TOKENS * Shape::COLUMNS) + index];
    }
    return sum;
}

//! y = sum + eta * shiftWeight + bias, rounded once. `eta` is 0 where nothing shifts.
template <typename T>
__device__ __forceinline__ void storeOutput(LinearArgs const& args, int64_t token, int32_t column,
                                            float sum, float eta) {
    if (args.selection.dynamicShift) {
        sum = fmaf(eta, __ldg(args.shiftWeight + column), sum);
    }
    if (args.bias != nullptr) {
        sum += toFloat<T>(static_cast<T const*>(args.bias)[column]);
    }
    static_cast<T*>(args.y)[token * args.outputs + column] = fromFloat<T>(sum);
}

}  // namespace nmexport::cuda
