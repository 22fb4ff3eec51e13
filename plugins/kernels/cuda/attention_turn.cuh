// Attention of one token: loads that stay before or behind the wait, tensor-core products, and the
// rotary turn of a head.
#pragma once

#include "attention.h"
#include "device_primitives.cuh"
#include "element.cuh"
#include "tensor_cores.cuh"

namespace nmexport::cuda::attention {

constexpr int kWARP_SIZE = 32;
constexpr int kWARPS = 8;
constexpr int kTHREADS = kWARPS * kWARP_SIZE;
constexpr int kRANKS = 8;                       // CTAs of a cluster: the most that always fit
constexpr int kTILE = 16;                       // positions
constexpr int kSLOTS = kRANKS * kWARPS;         // warps of a cluster
constexpr int kSTEP = kSLOTS * kTILE;           // positions from one of a warp's tiles to its next
constexpr int kCHUNK = 8;                       // elements in 16 bytes
constexpr int kMOST_GROUP = 8;                  // heads of queries to one of keys
constexpr int kPAD = 8;                         // floats between heads: fewer bank conflicts
constexpr float kLOG2_E = 1.4426950408889634F;  // scores are in units of log2
constexpr uint32_t kALL_LANES = 0xffffffffU;

__device__ __forceinline__ float lowest() {
    return __int_as_float(static_cast<int>(0xff800000U));
}

__device__ __forceinline__ float exp2Approx(float value) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
    return result;
}

//! 16 bytes of the cache or a table, or zeros. Not through the non-coherent path: the assembler
//! would move such loads behind the wait for the kernel before.
__device__ __forceinline__ uint4 loadConstantWhere(bool isThere, void const* address) {
    uint4 value;
    asm volatile(
        "{\n"
        ".reg .pred there;\n"
        "setp.ne.s32 there, %5, 0;\n"
        "mov.b32 %0, 0;\n"
        "mov.b32 %1, 0;\n"
        "mov.b32 %2, 0;\n"
        "mov.b32 %3, 0;\n"
        "@there ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\n"
        "}"
        : "=&r"(value.x), "=&r"(value.y), "=&r"(value.z), "=&r"(value.w)
        : "l"(address), "r"(static_cast<int>(isThere)));
    return value;
}

//! 16 bytes that the kernel before wrote, or zeros: from the L2, never a stale line of the L1.
__device__ __forceinline__ uint4 loadActivationsWhere(bool isThere, void const* address) {
    uint4 value;
    asm volatile(
        "{\n"
        ".reg .pred there;\n"
        "setp.ne.s32 there, %5, 0;\n"
        "mov.b32 %0, 0;\n"
        "mov.b32 %1, 0;\n"
        "mov.b32 %2, 0;\n"
        "mov.b32 %3, 0;\n"
        "@there ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];\n"
        "}"
        : "=&r"(value.x), "=&r"(value.y), "=&r"(value.z), "=&r"(value.w)
        : "l"(address), "r"(static_cast<int>(isThere)));
    return value;
}

__device__ __forceinline__ uint32_t sharedAddress(void const* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

//! To and from shared memory, by instructions that the compiler neither drops nor moves out of a
//! loop.
__device__ __forceinline__ void storeShared(uint32_t address, uint4 value) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(value.x),
                 "r"(value.y), "r"(value.z), "r"(value.w)
                 : "memory");
}

__device__ __forceinline__ uint4 loadShared(uint32_t address) {
    uint4 value;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "r"(address));
    return value;
}

//! One of four words; the index is known when this is compiled.
__device__ __forceinline__ uint32_t word(uint4 const& from, int index) {
    return index == 0 ? from.x : index == 1 ? from.y : index == 2 ? from.z : from.w;
}

__device__ __forceinline__ uint32_t packed(float low, float high, __half const*) {
    __half2 const both = __floats2half2_rn(low, high);
    uint32_t bits;
    memcpy(&bits, &both, sizeof(bits));
    return bits;
}

__device__ __forceinline__ uint32_t packed(float low, float high, __nv_bfloat16 const*) {
    __nv_bfloat162 const both = __floats2bfloat162_rn(low, high);
    uint32_t bits;
    memcpy(&bits, &both, sizeof(bits));
    return bits;
}

//! Cosines and sines of one position for a lane's chunks t, t + 4, ... of a head. WHOLE: all of a
//! head is turned, so both of a pair of elements are the same lane's.
template <typename T, int HEAD, bool WHOLE>
struct Turn {
    static constexpr int kCHUNKS = HEAD / 32;
    static constexpr int kTABLE = WHOLE ? kCHUNKS / 2 : kCHUNKS;

    int32_t half;  //!< chunks of a half of the rotary part
    uint4 cosine[kTABLE];
    uint4 sine[kTABLE];

    __device__ void load(AttentionArgs const& args, int32_t position, int t) {
        half = args.rotary / (2 * kCHUNK);
        int64_t const row = static_cast<int64_t>(min(position, args.positions - 1)) * half;
#pragma unroll
        for (int i = 0; i < kTABLE; ++i) {
            int const chunk = t + 4 * i;
            bool const isTurned = WHOLE || chunk < 2 * half;
            int64_t const at = (row + (WHOLE || chunk < half ? chunk : chunk - half)) * kCHUNK;
            cosine[i] = loadConstantWhere(isTurned, static_cast<T const*>(args.cosines) + at);
            sine[i] = loadConstantWhere(isTurned, static_cast<T const*>(args.sines) + at);
        }
    }

    //! The lane's chunks of a head, turned and rounded to T.
    __device__ void apply(uint4 (&turned)[kCHUNKS], bool isThere, T const* head, int t) const {
#pragma unroll
        for (int i = 0; i < kCHUNKS; ++i) {
            turned[i] = loadActivationsWhere(isThere, head + (t + 4 * i) * kCHUNK);
        }
        if constexpr (WHOLE) {
#pragma unroll
            for (int i = 0; i < kTABLE; ++i) {
                uint4 const first = turned[i];
                uint4 const second = turned[i + kTABLE];
                turned[i] = turn(first, second, cosine[i], sine[i], true);
                turned[i + kTABLE] = turn(second, first, cosine[i], sine[i], false);
            }
        } else {
            turnPart(turned, isThere, head, t);
        }
    }

  private:
    __device__ void turnPart(uint4 (&turned)[kCHUNKS], bool isThere, T const* head, int t) const {
        uint4 partner[kCHUNKS];
#pragma unroll
        for (int i = 0; i < kCHUNKS; ++i) {
            int const chunk = t + 4 * i;
            int const other = chunk < half ? chunk + half : chunk - half;
            partner[i] = loadActivationsWhere(isThere && chunk < 2 * half, head + other * kCHUNK);
        }
#pragma unroll
        for (int i = 0; i < kTABLE; ++i) {
            int const chunk = t + 4 * i;
            if (chunk < 2 * half) {
                turned[i] = turn(turned[i], partner[i], cosine[i], sine[i], chunk < half);
            }
        }
    }

    //! x · cos - partner · sin in the first half, x · cos + partner · sin in the second.
    static __device__ uint4 turn(uint4 own, uint4 partner, uint4 cosine, uint4 sine, bool isFirst) {
        T const* const type = nullptr;
        Unpacked<T> const x = unpack(own, type);
        Unpacked<T> const other = unpack(partner, type);
        Unpacked<T> const c = unpack(cosine, type);
        Unpacked<T> const s = unpack(sine, type);
        float result[kCHUNK];
#pragma unroll
        for (int i = 0; i < kCHUNK; ++i) {
            float const across = isFirst ? -other.value[i] : other.value[i];
            result[i] = x.value[i] * c.value[i] + across * s.value[i];
        }
        return {packed(result[0], result[1], type), packed(result[2], result[3], type),
                packed(result[4], result[5], type), packed(result[6], result[7], type)};
    }
};

}  // namespace nmexport::cuda::attention
