// Attention of one token: how warps and the CTAs of a cluster add up what they found.
#pragma once

#include "attention_tiles.cuh"

namespace nmexport::cuda::attention {

//! Shared memory of a CTA, the same in all of a cluster. Only rank 0 is sent to.
template <int HEAD>
struct Exchange {
    __device__ Exchange(unsigned char* bytes, int group)
        : group{group},
          mailbox{reinterpret_cast<uint64_t*>(bytes)},
          sums{reinterpret_cast<float2*>(bytes + 16)},
          states{sums + kRANKS * group * (HEAD / 2)},
          warpSums{reinterpret_cast<float*>(states + kRANKS * group)},
          warpStates{reinterpret_cast<float2*>(warpSums + kWARPS * group * (HEAD + kPAD))} {}

    static size_t bytes(int group) {
        size_t const heads = static_cast<size_t>(group);
        return 16 + kRANKS * heads * (HEAD / 2 + 1) * sizeof(float2) +
               kWARPS * heads * ((HEAD + kPAD) * sizeof(float) + sizeof(float2));
    }

    __device__ float* sumsOf(int warp) const { return warpSums + warp * group * (HEAD + kPAD); }

    __device__ uint32_t mailBytes() const {
        return static_cast<uint32_t>(kRANKS * group * (HEAD / 2 + 1) * sizeof(float2));
    }

    int group;  //!< heads
    uint64_t* mailbox;
    float2* sums;        //!< [ranks, heads, HEAD / 2]
    float2* states;      //!< [ranks, heads] highest and total
    float* warpSums;     //!< [warps, heads, HEAD + kPAD]; before, each warp's queries lie there
    float2* warpStates;  //!< [warps, heads]
};

template <typename T, int HEAD>
__device__ __forceinline__ void storeWarp(Exchange<HEAD> const& exchange,
                                          Softmax<T, HEAD> const& softmax, int warp, int g, int t) {
    float total = softmax.total;
    total += __shfl_xor_sync(kALL_LANES, total, 1);
    total += __shfl_xor_sync(kALL_LANES, total, 2);
    if (t == 0 && g < exchange.group) {
        exchange.warpStates[warp * exchange.group + g] = {softmax.highest, total};
    }
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) {
        int const head = 2 * t + odd;
        if (head >= exchange.group) {
            continue;
        }
        float* const to = exchange.sumsOf(warp) + head * (HEAD + kPAD);
#pragma unroll
        for (int m = 0; m < HEAD / 64; ++m) {
#pragma unroll
            for (int j = 0; j < 4; j += 2) {
                auto const& s = softmax.sums[m];
                *reinterpret_cast<float4*>(to + (g + 8 * m) * kCHUNK + 2 * j) = {
                    s[j][odd], s[j][2 + odd], s[j + 1][odd], s[j + 1][2 + odd]};
            }
        }
    }
}

//! Adds up partial sums that were made against different highest scores.
template <int COUNT>
struct Merged {
    float highest{lowest()};
    float total{0.0F};
    float2 sum{0.0F, 0.0F};

    //! `sumOf(i)` and states[i * stride] of part i.
    template <typename SumOf>
    __device__ Merged(float2 const* states, int stride, SumOf const& sumOf) {
        float2 state[COUNT];
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            state[i] = states[i * stride];
            highest = fmaxf(highest, state[i].x);
        }
        float const base = highest == lowest() ? 0.0F : highest;
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            float const factor = exp2Approx(state[i].x - base);
            float2 const part = sumOf(i);
            total += state[i].y * factor;
            sum.x += part.x * factor;
            sum.y += part.y * factor;
        }
    }
};

__device__ __forceinline__ uint64_t bitsOf(float2 value) {
    return static_cast<uint64_t>(__float_as_uint(value.y)) << 32 | __float_as_uint(value.x);
}

//! Sends what this CTA's warps found to rank 0.
template <int HEAD>
__device__ __forceinline__ void sendSums(Exchange<HEAD> const& exchange, uint32_t rank) {
    int const items = exchange.group * (HEAD / 2);
    for (int item = threadIdx.x; item < items; item += kTHREADS) {
        int const head = item / (HEAD / 2);
        int const pair = item % (HEAD / 2);
        Merged<kWARPS> const merged(exchange.warpStates + head, exchange.group, [&](int warp) {
            return *reinterpret_cast<float2 const*>(exchange.sumsOf(warp) + head * (HEAD + kPAD) +
                                                    2 * pair);
        });
        sendToRankZero(reinterpret_cast<uint64_t*>(exchange.sums + rank * items + item),
                       bitsOf(merged.sum), exchange.mailbox);
        if (pair == 0) {
            sendToRankZero(
                reinterpret_cast<uint64_t*>(exchange.states + rank * exchange.group + head),
                bitsOf({merged.highest, merged.total}), exchange.mailbox);
        }
    }
}

//! Rank 0, once all has come.
template <typename T, int HEAD>
__device__ __forceinline__ void storeResult(Exchange<HEAD> const& exchange, T* y) {
    int const items = exchange.group * (HEAD / 2);
    for (int item = threadIdx.x; item < items; item += kTHREADS) {
        Merged<kRANKS> const merged(exchange.states + item / (HEAD / 2), exchange.group,
                                    [&](int rank) { return exchange.sums[rank * items + item]; });
        float const share = 1.0F / merged.total;
        reinterpret_cast<uint32_t*>(y)[item] =
            packed(merged.sum.x * share, merged.sum.y * share, static_cast<T const*>(nullptr));
    }
}

}  // namespace nmexport::cuda::attention
