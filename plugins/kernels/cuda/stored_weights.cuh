// Stored weights in registers: from bytes of neighbouring rows to the operands of a tensor core's
// product, and the scales and zero points of a group.
#pragma once

#include "device_primitives.cuh"
#include "stored_dispatch.cuh"
#include "tensor_cores.cuh"

#include <cuda_fp8.h>

#include <type_traits>

namespace nmexport::cuda {

//! Columns in 4 bytes of a row.
template <Storage STORAGE>
inline constexpr int kPER_WORD = STORAGE == Storage::kINT4 ? 8 : 4;

//! a - b of two values of T in each word.
template <typename T>
__device__ __forceinline__ uint32_t subtractPairs(uint32_t a, uint32_t b) {
    if constexpr (std::is_same_v<T, __half>) {
        __half2 first, second;
        memcpy(&first, &a, sizeof(a));
        memcpy(&second, &b, sizeof(b));
        first = __hsub2(first, second);
        memcpy(&a, &first, sizeof(a));
    } else {
        __nv_bfloat162 first, second;
        memcpy(&first, &a, sizeof(a));
        memcpy(&second, &b, sizeof(b));
        first = __hsub2(first, second);
        memcpy(&a, &first, sizeof(a));
    }
    return a;
}

//! How an operand stands for a stored value v: it is (v + offset) / factor. To subtract an offset
//! from every operand takes an instruction for two; from a sum of products it takes one product of
//! all ones for 16 rows, see StoredSums.
struct Encoding {
    float factor{1.0F};
    float offset{0.0F};
};

//! Turns the same columns of two neighbouring rows of an operand, a word of each, into a word of
//! two T for every column, the first row's value low. Every operand is exact in T. encodingOf gives
//! what column i of a word stands for, and OFFSETS whether any of them has an offset. Eight tokens
//! leave too few registers for the sum that takes those of bytes off.
template <typename T, Storage STORAGE, int TOKENS>
class PairReader;

//! A byte becomes the low bits of a float whose unit is 1: 1024 + 128 + b in float16. The 7 bits of
//! a bfloat16 hold 128 + (b & 127); the sign bit, at the place of that float's exponent, makes what
//! is subtracted 256 instead of 128.
template <typename T, int TOKENS>
class PairReader<T, Storage::kINT8, TOKENS> {
    static constexpr bool IS_HALF = std::is_same_v<T, __half>;

  public:
    static constexpr bool OFFSETS = IS_HALF && TOKENS == 1;

    __device__ explicit PairReader(WeightType) {}

    __device__ Encoding encodingOf(int) const { return {1.0F, OFFSETS ? 1152.0F : 0.0F}; }

    __device__ void read(uint32_t first, uint32_t second, uint32_t (&pairs)[4]) const {
        uint32_t const low = __byte_perm(first, second, 0x5140);
        uint32_t const high = __byte_perm(first, second, 0x7362);
        pairs[0] = pairOf(low, 0x4140);
        pairs[1] = pairOf(low, 0x4342);
        pairs[2] = pairOf(high, 0x4140);
        pairs[3] = pairOf(high, 0x4342);
    }

  private:
    __device__ static uint32_t pairOf(uint32_t bytes, uint32_t selector) {
        if constexpr (IS_HALF) {
            uint32_t const floats = __byte_perm(bytes ^ 0x80808080U, 0x64646464U, selector);
            return OFFSETS ? floats : subtractPairs<T>(floats, 0x64806480U);
        } else {
            uint32_t const floats = __byte_perm(bytes, 0x43434343U, selector);
            return subtractPairs<T>(floats & 0xff7fff7fU, floats & 0xff80ff80U);
        }
    }
};

//! 4 bits in the same way, above 1024 in float16 and 128 in bfloat16; every second one of a float16
//! is taken where it lies, 16 times as large.
template <typename T, int TOKENS>
class PairReader<T, Storage::kINT4, TOKENS> {
  public:
    static constexpr bool OFFSETS = true;

    __device__ explicit PairReader(WeightType type) {
        // A signed value with its sign bit turned is 8 more than it was.
        mSign = type == WeightType::kINT4 ? 8U : 0U;
        mFloats = kUNIT | mSign | mSign << 16;
        mHighFloats = kUNIT | mSign << 4 | mSign << 20;
    }

    __device__ Encoding encodingOf(int column) const {
        float const sign = static_cast<float>(mSign);
        if (IS_HALF && column % 2 == 1) {
            return {0.0625F, 64.0F + sign};
        }
        return {1.0F, (IS_HALF ? 1024.0F : 128.0F) + sign};
    }

    __device__ void read(uint32_t first, uint32_t second, uint32_t (&pairs)[8]) const {
        uint32_t const low = __byte_perm(first, second, 0x5410);
        uint32_t const high = __byte_perm(first, second, 0x7632);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            pairs[i] = pairOf(low, i);
            pairs[4 + i] = pairOf(high, i);
        }
    }

  private:
    static constexpr bool IS_HALF = std::is_same_v<T, __half>;
    static constexpr uint32_t kUNIT = IS_HALF ? 0x64006400U : 0x43004300U;  // 1024, 128

    __device__ uint32_t pairOf(uint32_t fours, int i) const {
        if (IS_HALF && i % 2 == 1) {
            return (fours >> 4 * (i - 1) & 0x00f000f0U) ^ mHighFloats;
        }
        return (fours >> 4 * i & 0x000f000fU) ^ mFloats;
    }

    uint32_t mSign, mFloats, mHighFloats;
};

//! Two 8-bit floats as float16 bits. Where the hardware does not convert, CUDA's own code for it
//! takes minutes to compile in so many places: exponents there are biased 8 less than float16's, so
//! that the bits are moved and multiplied by 256, which is exact for small ones too.
__device__ __forceinline__ uint32_t halvesOfFloat8(uint32_t two) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 890
    uint32_t const spread = __byte_perm(two, 0U, 0x1404);
    uint32_t const magnitudes = spread >> 1 & 0x3f803f80U;
    uint32_t const nans = __vcmpeq2(magnitudes, 0x3f803f80U);
    uint32_t const floats = magnitudes | (spread & 0x80008000U);
    __half2 const factor = __half2half2(wordHalf<__half>(0x5c00U));
    __half2 const halves =
        __hmul2(__halves2half2(wordHalf<__half>(floats), wordHalf<__half>(floats >> 16)), factor);
    return packWord<__half>(__low2half(halves), __high2half(halves)) | nans;
#else
    __half2_raw const halves =
        __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(two), __NV_E4M3);
    return halves.x | static_cast<uint32_t>(halves.y) << 16;
#endif
}

template <typename T, int TOKENS>
class PairReader<T, Storage::kFLOAT8, TOKENS> {
  public:
    static constexpr bool OFFSETS = false;

    __device__ explicit PairReader(WeightType) {}

    __device__ Encoding encodingOf(int) const { return {}; }

    __device__ void read(uint32_t first, uint32_t second, uint32_t (&pairs)[4]) const {
        uint32_t const low = __byte_perm(first, second, 0x5140);
        uint32_t const high = __byte_perm(first, second, 0x7362);
        pairs[0] = pairOf(low & 0xffffU);
        pairs[1] = pairOf(low >> 16);
        pairs[2] = pairOf(high & 0xffffU);
        pairs[3] = pairOf(high >> 16);
    }

  private:
    __device__ static uint32_t pairOf(uint32_t two) {
        uint32_t const halves = halvesOfFloat8(two);
        if constexpr (std::is_same_v<T, __half>) {
            return halves;
        } else {
            float2 const both = make_float2(__half2float(wordHalf<__half>(halves)),
                                            __half2float(wordHalf<__half>(halves >> 16)));
            return __byte_perm(__float_as_uint(both.x), __float_as_uint(both.y), 0x7632);
        }
    }
};

//! One stored value at `index` of its array.
template <Storage STORAGE>
__device__ __forceinline__ float storedValue(void const* array, int64_t index, bool isSigned) {
    unsigned char const* const bytes = static_cast<unsigned char const*>(array);
    if constexpr (STORAGE == Storage::kINT8) {
        return static_cast<float>(static_cast<signed char>(__ldg(bytes + index)));
    } else if constexpr (STORAGE == Storage::kINT4) {
        int const four = __ldg(bytes + index / 2) >> (index % 2 == 0 ? 0 : 4) & 15;
        return static_cast<float>(isSigned && four >= 8 ? four - 16 : four);
    } else {
        __half_raw const half = __nv_cvt_fp8_to_halfraw(__ldg(bytes + index), __NV_E4M3);
        return __half2float(__half(half));
    }
}

//! The scale of group g and output o at `index` g * O + o.
template <typename T>
__device__ __forceinline__ float scaleAt(StoredWeights const& stored, int64_t index) {
    return stored.scaleIsT ? toFloat<T>(static_cast<T const*>(stored.scale)[index])
                           : __ldg(static_cast<float const*>(stored.scale) + index);
}

//! The zero point at `index`; there is one.
template <Storage STORAGE>
__device__ __forceinline__ float zeroAt(StoredWeights const& stored, int64_t index) {
    return stored.zeroPointIsFloat
               ? __ldg(static_cast<float const*>(stored.zeroPoint) + index)
               : storedValue<STORAGE>(stored.zeroPoint, index, stored.type == WeightType::kINT4);
}

//! Scales of four neighbouring outputs from `index`, a multiple of 4, of an array on 16 bytes.
template <typename T>
__device__ __forceinline__ float4 scalesAt(StoredWeights const& stored, int64_t index) {
    if (!stored.scaleIsT) {
        return __ldg(
            reinterpret_cast<float4 const*>(static_cast<float const*>(stored.scale) + index));
    }
    uint2 const words =
        __ldg(reinterpret_cast<uint2 const*>(static_cast<T const*>(stored.scale) + index));
    return make_float4(toFloat<T>(wordHalf<T>(words.x)), toFloat<T>(wordHalf<T>(words.x >> 16)),
                       toFloat<T>(wordHalf<T>(words.y)), toFloat<T>(wordHalf<T>(words.y >> 16)));
}

//! Zero points of four neighbouring outputs.
template <Storage STORAGE>
__device__ __forceinline__ float4 zerosAt(StoredWeights const& stored, int64_t index) {
    return make_float4(zeroAt<STORAGE>(stored, index), zeroAt<STORAGE>(stored, index + 1),
                       zeroAt<STORAGE>(stored, index + 2), zeroAt<STORAGE>(stored, index + 3));
}

}  // namespace nmexport::cuda
