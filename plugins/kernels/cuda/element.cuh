// Element types: conversion to and from float32, and the 16-byte vector of each.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace nmexport::cuda {

template <typename T>
__device__ __forceinline__ float toFloat(T value);

template <>
__device__ __forceinline__ float toFloat<float>(float value) {
    return value;
}

template <>
__device__ __forceinline__ float toFloat<__half>(__half value) {
    return __half2float(value);
}

template <>
__device__ __forceinline__ float toFloat<__nv_bfloat16>(__nv_bfloat16 value) {
    return __bfloat162float(value);
}

template <typename T>
__device__ __forceinline__ T fromFloat(float value);

template <>
__device__ __forceinline__ float fromFloat<float>(float value) {
    return value;
}

template <>
__device__ __forceinline__ __half fromFloat<__half>(float value) {
    return __float2half_rn(value);
}

template <>
__device__ __forceinline__ __nv_bfloat16 fromFloat<__nv_bfloat16>(float value) {
    return __float2bfloat16_rn(value);
}

//! The lowest NaN's magnitude bits of a 16-bit type: the one rank key that all its NaNs share.
template <typename T>
inline constexpr uint32_t kNAN_KEY = 0;
template <>
inline constexpr uint32_t kNAN_KEY<__half> = 0x7c01;
template <>
inline constexpr uint32_t kNAN_KEY<__nv_bfloat16> = 0x7f81;

//! A 16-bit float from its bits.
template <typename T>
__device__ __forceinline__ T wordHalf(uint32_t bits) {
    unsigned short const half = static_cast<unsigned short>(bits);
    T value;
    memcpy(&value, &half, sizeof(value));
    return value;
}

//! Two 16-bit floats as one word, the first in the low half.
template <typename T>
__device__ __forceinline__ uint32_t packWord(T low, T high) {
    unsigned short halves[2];
    memcpy(&halves[0], &low, sizeof(low));
    memcpy(&halves[1], &high, sizeof(high));
    return halves[0] | static_cast<uint32_t>(halves[1]) << 16;
}

//! Elements in 16 bytes.
template <typename T>
inline constexpr int kVECTOR = 16 / static_cast<int>(sizeof(T));

//! 16 bytes of T as float32.
template <typename T>
struct Unpacked {
    float value[kVECTOR<T>];
};

__device__ __forceinline__ Unpacked<float> unpack(uint4 raw, float const*) {
    return {{__uint_as_float(raw.x), __uint_as_float(raw.y), __uint_as_float(raw.z),
             __uint_as_float(raw.w)}};
}

__device__ __forceinline__ Unpacked<__nv_bfloat16> unpack(uint4 raw, __nv_bfloat16 const*) {
    uint32_t const words[4] = {raw.x, raw.y, raw.z, raw.w};
    Unpacked<__nv_bfloat16> out;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        out.value[2 * i] = __uint_as_float(words[i] << 16);
        out.value[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000U);
    }
    return out;
}

__device__ __forceinline__ Unpacked<__half> unpack(uint4 raw, __half const*) {
    uint32_t const words[4] = {raw.x, raw.y, raw.z, raw.w};
    Unpacked<__half> out;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        __half2_raw pair;
        pair.x = static_cast<unsigned short>(words[i] & 0xffffU);
        pair.y = static_cast<unsigned short>(words[i] >> 16);
        float2 const both = __half22float2(__half2(pair));
        out.value[2 * i] = both.x;
        out.value[2 * i + 1] = both.y;
    }
    return out;
}

}  // namespace nmexport::cuda
