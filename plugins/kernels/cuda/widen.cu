// Stored weights as elements of T, a tile of columns at a time, for a dense product.
#include "stored.h"
#include "stored_weights.cuh"
#include "work_split.h"

namespace nmexport::cuda {
namespace {

constexpr int kLANES = 32;     // along columns
constexpr int kROW_LANES = 8;  // threads along rows
constexpr int kROWS = 8;       // of one thread; a group has a multiple of 16
constexpr int kCOLUMNS = 8;    // of one thread
constexpr int kTILE = kLANES * kCOLUMNS;

//! The stored values of 8 neighbouring columns, as exact float32. `words`: their bytes, the second
//! unused where a value has 4 bits.
template <Storage STORAGE>
__device__ __forceinline__ void valuesOf(uint2 words, bool isSigned, float (&values)[kCOLUMNS]) {
#pragma unroll
    for (int i = 0; i < kCOLUMNS; ++i) {
        if constexpr (STORAGE == Storage::kINT4) {
            uint32_t const four = (words.x >> 4 * i & 15U) ^ (isSigned ? 8U : 0U);
            // 2^23 + four: a float whose unit is 1
            values[i] = __uint_as_float(0x4b000000U | four) - (isSigned ? 8388616.0F : 8388608.0F);
        } else {
            uint32_t const byte = (i < 4 ? words.x : words.y) >> 8 * (i % 4) & 255U;
            if constexpr (STORAGE == Storage::kINT8) {
                values[i] = __uint_as_float(0x4b000000U | (byte ^ 128U)) - 8388736.0F;
            } else {
                __half_raw const half =
                    __nv_cvt_fp8_to_halfraw(static_cast<__nv_fp8_storage_t>(byte), __NV_E4M3);
                values[i] = __half2float(__half(half));
            }
        }
    }
}

template <typename T>
__device__ __forceinline__ void storeEight(T* to, float const (&values)[kCOLUMNS]) {
    union {
        T elements[kCOLUMNS];
        uint4 raw[kCOLUMNS * sizeof(T) / 16];
    } out;
#pragma unroll
    for (int i = 0; i < kCOLUMNS; ++i) {
        out.elements[i] = fromFloat<T>(values[i]);
    }
#pragma unroll
    for (int i = 0; i < static_cast<int>(kCOLUMNS * sizeof(T) / 16); ++i) {
        reinterpret_cast<uint4*>(to)[i] = out.raw[i];
    }
}

//! `isAligned`: eight columns of a row are one load and lie on 16 bytes where they are stored.
template <typename T, Storage STORAGE>
__global__ void __launch_bounds__(kLANES* kROW_LANES)
    widenKernel(WidenArgs const args, bool const isAligned) {
    int32_t const column = static_cast<int32_t>(blockIdx.x) * kTILE +
                           static_cast<int32_t>(threadIdx.x % kLANES) * kCOLUMNS;
    int32_t const firstRow = (static_cast<int32_t>(blockIdx.y) * kROW_LANES +
                              static_cast<int32_t>(threadIdx.x / kLANES)) *
                             kROWS;
    int32_t const count = min(kCOLUMNS, args.columns - column);
    if (count <= 0 || firstRow >= args.channels) {
        return;
    }
    bool const isSigned = args.stored.type == WeightType::kINT4;
    int32_t const output = args.firstColumn + column;
    int64_t const group = firstRow / (args.channels / args.stored.groups);
    float scale[kCOLUMNS] = {};
    float zero[kCOLUMNS] = {};
#pragma unroll
    for (int i = 0; i < kCOLUMNS; ++i) {
        if (i < count) {
            int64_t const index = group * args.outputs + output + i;
            scale[i] = scaleAt<T>(args.stored, index);
            zero[i] = args.stored.zeroPoint == nullptr ? 0.0F : zeroAt<STORAGE>(args.stored, index);
        }
    }
    T* const to = static_cast<T*>(args.to) + column;
    int32_t const end = min(firstRow + kROWS, args.channels);
#pragma unroll 4
    for (int32_t row = firstRow; row < end; ++row) {
        int64_t const index = static_cast<int64_t>(row) * args.outputs + output;
        T* const target = to + static_cast<int64_t>(row) * args.columns;
        float values[kCOLUMNS];
        if (isAligned) {
            constexpr int kPER_BYTE = STORAGE == Storage::kINT4 ? 2 : 1;
            unsigned char const* const bytes =
                static_cast<unsigned char const*>(args.w) + index / kPER_BYTE;
            uint2 const words = STORAGE == Storage::kINT4
                                    ? make_uint2(__ldg(reinterpret_cast<uint32_t const*>(bytes)), 0)
                                    : __ldg(reinterpret_cast<uint2 const*>(bytes));
            valuesOf<STORAGE>(words, isSigned, values);
#pragma unroll
            for (int i = 0; i < kCOLUMNS; ++i) {
                values[i] = (values[i] - zero[i]) * scale[i];
            }
            storeEight<T>(target, values);
            continue;
        }
#pragma unroll
        for (int i = 0; i < kCOLUMNS; ++i) {
            if (i < count) {
                float const value = storedValue<STORAGE>(args.w, index + i, isSigned);
                target[i] = fromFloat<T>((value - zero[i]) * scale[i]);
            }
        }
    }
}

template <typename T, Storage STORAGE>
cudaError_t launchOf(WidenArgs const& args, cudaStream_t stream) {
    int32_t const bytes = STORAGE == Storage::kINT4 ? 4 : 8;  // of eight columns
    bool const isAligned = args.outputs % kCOLUMNS == 0 && args.columns % kCOLUMNS == 0 &&
                           args.firstColumn % kCOLUMNS == 0 &&
                           reinterpret_cast<uintptr_t>(args.w) % static_cast<uint32_t>(bytes) == 0;
    dim3 const grid(static_cast<unsigned>(ceilDivide(args.columns, kTILE)),
                    static_cast<unsigned>(ceilDivide(args.channels, kROW_LANES * kROWS)));
    widenKernel<T, STORAGE><<<grid, kLANES * kROW_LANES, 0, stream>>>(args, isAligned);
    return cudaGetLastError();
}

template <typename T>
cudaError_t launchOf(WidenArgs const& args, cudaStream_t stream) {
    switch (args.stored.type) {
        case WeightType::kINT8:
            return launchOf<T, Storage::kINT8>(args, stream);
        case WeightType::kINT4:
        case WeightType::kUINT4:
            return launchOf<T, Storage::kINT4>(args, stream);
        case WeightType::kFLOAT8:
            return launchOf<T, Storage::kFLOAT8>(args, stream);
        default:
            return cudaErrorInvalidValue;
    }
}

}  // namespace

cudaError_t launchWiden(WidenArgs const& args, cudaStream_t stream) {
    bool const isTile = args.firstColumn >= 0 && args.columns >= 1 &&
                        args.firstColumn + args.columns <= args.outputs;
    bool const hasGroups =
        args.stored.groups >= 1 && args.channels >= 1 && args.channels % args.stored.groups == 0 &&
        (args.stored.groups == 1 || args.channels / args.stored.groups % kROWS == 0);
    if (!isTile || !hasGroups || args.w == nullptr || args.to == nullptr ||
        args.stored.scale == nullptr) {
        return cudaErrorInvalidValue;
    }
    switch (args.type) {
        case DType::kFLOAT32:
            return launchOf<float>(args, stream);
        case DType::kFLOAT16:
            return launchOf<__half>(args, stream);
        case DType::kBFLOAT16:
            return launchOf<__nv_bfloat16>(args, stream);
    }
    return cudaErrorInvalidValue;
}

}  // namespace nmexport::cuda
