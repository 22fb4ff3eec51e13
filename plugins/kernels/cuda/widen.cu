// Stored weights as elements of T, a tile of columns at a time, for a dense product.
#include "stored.h"
#include "stored_weights.cuh"
#include "work_split.h"

#include <type_traits>

namespace nmexport::cuda {
namespace {

constexpr int kLANES = 32;     // along columns
constexpr int kROW_LANES = 8;  // threads along rows
constexpr int kROWS = 8;       // of one thread; a group has a multiple of 16
constexpr int kCOLUMNS = 8;    // of one thread
constexpr int kTILE = kLANES * kCOLUMNS;

//! A stored value as an exact float32. `words`: the bytes of 8 neighbouring columns, the second
//! word unused where a value has 4 bits.
template <Storage STORAGE>
__device__ __forceinline__ float valueAt(uint2 words, int i, bool isSigned) {
    if constexpr (STORAGE == Storage::kINT4) {
        uint32_t const four = (words.x >> 4 * i & 15U) ^ (isSigned ? 8U : 0U);
        // 2^23 + four: a float whose unit is 1
        return __uint_as_float(0x4b000000U | four) - (isSigned ? 8388616.0F : 8388608.0F);
    } else {
        uint32_t const word = i < 4 ? words.x : words.y;
        if constexpr (STORAGE == Storage::kINT8) {
            uint32_t const bits = __byte_perm(word ^ 0x80808080U, 0x4b000000U, 0x7540U + i % 4);
            return __uint_as_float(bits) - 8388736.0F;
        } else {
            __half_raw const half = __nv_cvt_fp8_to_halfraw(
                static_cast<__nv_fp8_storage_t>(word >> 8 * (i % 4) & 255U), __NV_E4M3);
            return __half2float(__half(half));
        }
    }
}

//! Two values rounded to T.
template <typename T>
__device__ __forceinline__ uint32_t roundedPair(float low, float high) {
    uint32_t word;
    if constexpr (std::is_same_v<T, __half>) {
        __half2 const pair = __floats2half2_rn(low, high);
        memcpy(&word, &pair, sizeof(word));
    } else {
        __nv_bfloat162 const pair = __floats2bfloat162_rn(low, high);
        memcpy(&word, &pair, sizeof(word));
    }
    return word;
}

//! Eight columns of a row, evicted first: the second-level cache is for the tile.
template <Storage STORAGE>
__device__ __forceinline__ uint2 loadEight(void const* w, int64_t index) {
    unsigned char const* const bytes = static_cast<unsigned char const*>(w);
    if constexpr (STORAGE == Storage::kINT4) {
        return make_uint2(__ldcs(reinterpret_cast<uint32_t const*>(bytes + index / 2)), 0U);
    } else {
        return __ldcs(reinterpret_cast<uint2 const*>(bytes + index));
    }
}

//! Scales and zero points of eight neighbouring outputs.
template <typename T, Storage STORAGE>
struct EightScales {
    __device__ EightScales(StoredWeights const& stored, int64_t index) {
#pragma unroll
        for (int first = 0; first < kCOLUMNS; first += 4) {
            put(scale + first, scalesAt<T>(stored, index + first));
            put(zero + first, stored.zeroPoint == nullptr
                                  ? make_float4(0.0F, 0.0F, 0.0F, 0.0F)
                                  : zerosAt<STORAGE>(stored, index + first));
        }
    }

    float scale[kCOLUMNS];
    float zero[kCOLUMNS];

  private:
    __device__ static void put(float* to, float4 four) {
        to[0] = four.x;
        to[1] = four.y;
        to[2] = four.z;
        to[3] = four.w;
    }
};

//! Where eight columns of a row are one load, and one store. All loads of a thread are in flight
//! before it waits for the first.
template <typename T, Storage STORAGE>
__global__ void __launch_bounds__(kLANES* kROW_LANES) widenRowsKernel(WidenArgs const args) {
    int32_t const column = static_cast<int32_t>(blockIdx.x) * kTILE +
                           static_cast<int32_t>(threadIdx.x % kLANES) * kCOLUMNS;
    int32_t const firstRow = (static_cast<int32_t>(blockIdx.y) * kROW_LANES +
                              static_cast<int32_t>(threadIdx.x / kLANES)) *
                             kROWS;
    if (column >= args.columns || firstRow >= args.channels) {
        return;
    }
    int32_t const output = args.firstColumn + column;
    uint2 words[kROWS];
#pragma unroll
    for (int row = 0; row < kROWS; ++row) {
        words[row] = loadEight<STORAGE>(
            args.w, static_cast<int64_t>(firstRow + row) * args.outputs + output);
    }
    int64_t const group = firstRow / (args.channels / args.stored.groups);
    EightScales<T, STORAGE> const scales(args.stored, group * args.outputs + output);
    bool const isSigned = args.stored.type == WeightType::kINT4;
    T* const to = static_cast<T*>(args.to) + static_cast<int64_t>(firstRow) * args.columns + column;
#pragma unroll
    for (int row = 0; row < kROWS; ++row) {
        uint32_t pairs[kCOLUMNS / 2];
#pragma unroll
        for (int i = 0; i < kCOLUMNS; i += 2) {
            float const low = valueAt<STORAGE>(words[row], i, isSigned) - scales.zero[i];
            float const high = valueAt<STORAGE>(words[row], i + 1, isSigned) - scales.zero[i + 1];
            pairs[i / 2] = roundedPair<T>(low * scales.scale[i], high * scales.scale[i + 1]);
        }
        *reinterpret_cast<uint4*>(to + static_cast<int64_t>(row) * args.columns) =
            make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    }
}

//! Any shape and any T: a thread takes one column of kROWS rows.
template <typename T, Storage STORAGE>
__global__ void __launch_bounds__(kLANES* kROW_LANES) widenAnyKernel(WidenArgs const args) {
    int32_t const column =
        static_cast<int32_t>(blockIdx.x) * kLANES + static_cast<int32_t>(threadIdx.x % kLANES);
    int32_t const firstRow = (static_cast<int32_t>(blockIdx.y) * kROW_LANES +
                              static_cast<int32_t>(threadIdx.x / kLANES)) *
                             kROWS;
    if (column >= args.columns || firstRow >= args.channels) {
        return;
    }
    int32_t const output = args.firstColumn + column;
    int64_t const group = firstRow / (args.channels / args.stored.groups);
    int64_t const place = group * args.outputs + output;
    float const scale = scaleAt<T>(args.stored, place);
    float const zero =
        args.stored.zeroPoint == nullptr ? 0.0F : zeroAt<STORAGE>(args.stored, place);
    bool const isSigned = args.stored.type == WeightType::kINT4;
    int32_t const end = min(firstRow + kROWS, args.channels);
#pragma unroll 1
    for (int32_t row = firstRow; row < end; ++row) {
        int64_t const index = static_cast<int64_t>(row) * args.outputs + output;
        float const value = storedValue<STORAGE>(args.w, index, isSigned);
        static_cast<T*>(args.to)[static_cast<int64_t>(row) * args.columns + column] =
            fromFloat<T>((value - zero) * scale);
    }
}

bool isAligned(void const* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

//! Whether eight columns of every row are whole and lie on their size everywhere.
bool hasEights(WidenArgs const& args) {
    return args.channels % kROWS == 0 && args.outputs % kCOLUMNS == 0 &&
           args.columns % kCOLUMNS == 0 && args.firstColumn % kCOLUMNS == 0 && isAligned(args.w) &&
           isAligned(args.to) && isAligned(args.stored.scale);
}

template <typename T, Storage STORAGE>
cudaError_t launchOf(WidenArgs const& args, cudaStream_t stream) {
    auto const rows = static_cast<unsigned>(ceilDivide(args.channels, kROW_LANES * kROWS));
    auto const blocks = [&](int32_t columns) {
        return dim3(static_cast<unsigned>(ceilDivide(args.columns, columns)), rows);
    };
    if constexpr (!std::is_same_v<T, float>) {
        if (hasEights(args)) {
            widenRowsKernel<T, STORAGE><<<blocks(kTILE), kLANES * kROW_LANES, 0, stream>>>(args);
            return cudaGetLastError();
        }
    }
    widenAnyKernel<T, STORAGE><<<blocks(kLANES), kLANES * kROW_LANES, 0, stream>>>(args);
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
