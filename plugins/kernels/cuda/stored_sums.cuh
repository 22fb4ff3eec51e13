// The products of a window of stored rows, and their sums, scaled once a window. See
// stored_kernel.cuh.
#pragma once

#include "stored_rows.cuh"
#include "stored_weights.cuh"
#include "tensor_cores.cuh"

#include <type_traits>

namespace nmexport::cuda {

//! The sums of a window: of the products, and of the values alone, which zero points and offsets
//! of the operands take off.
template <typename Shape>
struct StoredSums {
    float product[Shape::PRODUCTS][4];
    float values[4];

    __device__ void clear() {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            values[i] = 0.0F;
#pragma unroll
            for (int p = 0; p < Shape::PRODUCTS; ++p) {
                product[p][i] = 0.0F;
            }
        }
    }
};

__device__ __forceinline__ uint32_t wordOf(uint4 const& raw, int word) {
    return word == 0 ? raw.x : (word == 1 ? raw.y : (word == 2 ? raw.z : raw.w));
}

__device__ __forceinline__ uint32_t wordOf(uint2 const& raw, int word) {
    return word == 0 ? raw.x : raw.y;
}

//! sums += one loaded batch.
template <typename Shape>
__device__ __forceinline__ void multiplyBatch(StoredSums<Shape>& sums,
                                              StoredBatch<Shape> const& batch,
                                              typename Shape::Reader const& reader,
                                              bool hasZeroPoint) {
    using T = typename Shape::Element;
    using Reader = typename Shape::Reader;
    constexpr int kPAIRS = kPER_WORD<Shape::STORAGE>;
#pragma unroll
    for (int step = 0; step < Shape::STEPS; ++step) {
        uint32_t const b0 = batch.values[step][0];
        uint32_t const b1 = batch.values[step][1];
        if (Reader::OFFSETS || hasZeroPoint) {
            constexpr uint32_t kONES = std::is_same_v<T, __half> ? 0x3c003c00U : 0x3f803f80U;
            multiplyTiles<T>(sums.values, kONES, kONES, kONES, kONES, b0, b1);
        }
        typename Shape::Vector const* const raw = batch.raw + 4 * step;
#pragma unroll
        for (int word = 0; word < Shape::WORDS; ++word) {
            uint32_t near[kPAIRS];
            uint32_t far[kPAIRS];
            reader.read(wordOf(raw[0], word), wordOf(raw[1], word), near);
            reader.read(wordOf(raw[2], word), wordOf(raw[3], word), far);
#pragma unroll
            for (int i = 0; i < kPAIRS; i += 2) {
                multiplyTiles<T>(sums.product[(word * kPAIRS + i) / 2], near[i], near[i + 1],
                                 far[i], far[i + 1], b0, b1);
            }
        }
    }
}

//! totals += scale * (factor * sum - (offset + zero) * values) of four neighbouring outputs, the
//! lane's from `first` on, in column `which` of its two of a product; `index` is that of the first
//! output in [G, O].
template <typename Shape>
__device__ __forceinline__ void addScaled(float (&totals)[4], StoredSums<Shape> const& sums,
                                          int first, int which, StoredWeights const& stored,
                                          int64_t index) {
    typename Shape::Reader const reader(stored.type);
    float4 const scales = scalesAt<typename Shape::Element>(stored, index);
    float const scale[4] = {scales.x, scales.y, scales.z, scales.w};
    float part[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        float const(&product)[4] = sums.product[(first + i) / 2];
        Encoding const encoding = reader.encodingOf(i);  // words begin at multiples of 4
        part[i] = which == 0 ? product[i % 2 * 2] : product[i % 2 * 2 + 1];
        if constexpr (Shape::Reader::OFFSETS) {
            part[i] = fmaf(-encoding.offset, sums.values[which], encoding.factor * part[i]);
        }
    }
    if (stored.zeroPoint != nullptr) {
        float4 const zeros = zerosAt<Shape::STORAGE>(stored, index);
        float const zero[4] = {zeros.x, zeros.y, zeros.z, zeros.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            part[i] = fmaf(-zero[i], sums.values[which], part[i]);
        }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        totals[i] = fmaf(scale[i], part[i], totals[i]);
    }
}

//! The total of four lanes that share outputs: lane t is left with that of the t-th.
__device__ __forceinline__ float addOverFour(float const (&totals)[4]) {
    bool const isUpper = (threadIdx.x & 2) != 0;
    bool const isOdd = (threadIdx.x & 1) != 0;
    float half[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        float const sent = isUpper ? totals[i] : totals[2 + i];
        half[i] = (isUpper ? totals[2 + i] : totals[i]) + __shfl_xor_sync(kWHOLE_WARP, sent, 2);
    }
    return (isOdd ? half[1] : half[0]) + __shfl_xor_sync(kWHOLE_WARP, isOdd ? half[0] : half[1], 1);
}

//! Scales the sums of a window of one token, its groups side by side, and adds them to the warp's.
template <typename Shape>
__device__ __forceinline__ void flushGroups(StoredSums<Shape> const& sums,
                                            typename Shape::Scratch* scratch,
                                            LinearArgs const& args, StoredLane const& lane,
                                            int32_t firstGroup, int32_t lastGroup) {
    int32_t const group = firstGroup / 8 * 8 + 2 * static_cast<int32_t>(StoredLane::t());
#pragma unroll
    for (int first = 0; first < Shape::WIDTH; first += 4) {
        float totals[4] = {};
#pragma unroll
        for (int which = 0; which < 2; ++which) {
            if (firstGroup <= group + which && group + which <= lastGroup) {
                int64_t const index =
                    static_cast<int64_t>(group + which) * args.outputs + lane.column + first;
                addScaled<Shape>(totals, sums, first, which, args.stored, index);
            }
        }
        scratch->sums[first / 4 * kWARP + threadIdx.x % kWARP] += addOverFour(totals);
    }
}

//! The same for eight tokens, all of one group.
template <typename Shape>
__device__ __forceinline__ void flushTokens(StoredSums<Shape> const& sums,
                                            typename Shape::Scratch* scratch,
                                            LinearArgs const& args, StoredLane const& lane,
                                            int32_t group) {
    int64_t const index = static_cast<int64_t>(group) * args.outputs + lane.column;
#pragma unroll
    for (int first = 0; first < Shape::WIDTH; first += 4) {
#pragma unroll
        for (int which = 0; which < 2; ++which) {
            float totals[4] = {};
            addScaled<Shape>(totals, sums, first, which, args.stored, index + first);
            float* const target = scratch->sums + (2 * StoredLane::t() + which) * Shape::COLUMNS +
                                  StoredLane::g() * Shape::WIDTH + first;
            float4& four = *reinterpret_cast<float4*>(target);
            four = make_float4(four.x + totals[0], four.y + totals[1], four.z + totals[2],
                               four.w + totals[3]);
        }
    }
}

//! Scales the sums of the window [begin, end), adds them to the warp's and begins anew.
template <typename Shape>
__device__ __forceinline__ void flushWindow(StoredSums<Shape>& sums,
                                            typename Shape::Scratch* scratch,
                                            LinearArgs const& args, StoredLane const& lane,
                                            int32_t begin, int32_t end) {
    int32_t const firstGroup = begin >> lane.groupShift;
    if constexpr (Shape::TOKENS == 1) {
        flushGroups<Shape>(sums, scratch, args, lane, firstGroup, (end - 1) >> lane.groupShift);
    } else {
        flushTokens<Shape>(sums, scratch, args, lane, firstGroup);
    }
    sums.clear();
}

}  // namespace nmexport::cuda
