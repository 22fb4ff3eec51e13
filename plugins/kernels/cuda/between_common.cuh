// What the kernels between the linears share: block sizes, eight values at a time, a block's sum.
#pragma once

#include "between.h"
#include "device_primitives.cuh"
#include "element.cuh"
#include "warp_selection.cuh"

namespace nmexport::cuda::between {

//! Threads of a block: 8 elements each are a token of 4096 channels in one go; and of a block that
//! shares its multiprocessor with others.
constexpr int kTHREADS = 512;
constexpr int kMANY_THREADS = 256;
constexpr int kWARPS = kTHREADS / kWARP;
constexpr int kPAIR_THREADS = 128;  // 2 elements each: many blocks for one token

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

//! Runs of 8 channels that a thread has of a row that some rows share a block for.
constexpr int kOCTETS = 2;

}  // namespace nmexport::cuda::between
