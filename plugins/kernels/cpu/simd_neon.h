// Four lanes of AArch64 Advanced SIMD.
#pragma once

#include <arm_neon.h>

#include "element.h"

namespace nmexport {
namespace {

struct Simd {
    static constexpr int kLANES = 4;
    static constexpr bool kCOMPRESSES = false;
    static constexpr std::size_t kREGISTERS = 32;
    using F = float32x4_t;
    using I = int32x4_t;

    static F broadcast(float value) { return vdupq_n_f32(value); }
    static F load(const float* from) { return vld1q_f32(from); }
    static F load(const Float16* from) {
        return vcvt_f32_f16(
            vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const std::uint16_t*>(from))));
    }
    static F load(const BFloat16* from) {
        return vreinterpretq_f32_u32(
            vshll_n_u16(vld1_u16(reinterpret_cast<const std::uint16_t*>(from)), 16));
    }
    static F load(const Int8* from) {
        std::int8_t bytes[8] = {};
        std::memcpy(bytes, from, kLANES);
        return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vld1_s8(bytes)))));
    }
    template <typename T>
    static F loadPartial(const T* from, int count) {
        T lanes[kLANES] = {};
        std::memcpy(lanes, from, sizeof(T) * static_cast<std::size_t>(count));
        return load(lanes);
    }
    static void store(float* to, F value) { vst1q_f32(to, value); }
    static void store(Float16* to, F value) {
        vst1_u16(reinterpret_cast<std::uint16_t*>(to), vreinterpret_u16_f16(vcvt_f16_f32(value)));
    }
    static void store(BFloat16* to, F value) {
        float lanes[kLANES];
        store(lanes, value);
        for (int i = 0; i < kLANES; ++i) fromFloat(lanes[i], to + i);
    }
    template <typename T>
    static void storePartial(T* to, F value, int count) {
        T lanes[kLANES];
        store(lanes, value);
        std::memcpy(to, lanes, sizeof(T) * static_cast<std::size_t>(count));
    }
    static F gather(const float* from, const std::int32_t* index) {
        const float lanes[kLANES] = {from[index[0]], from[index[1]], from[index[2]],
                                     from[index[3]]};
        return vld1q_f32(lanes);
    }
    static F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
    static F mul(F a, F b) { return vmulq_f32(a, b); }
    static F add(F a, F b) { return vaddq_f32(a, b); }
    static F sub(F a, F b) { return vsubq_f32(a, b); }

    static I broadcastInt(std::int32_t value) { return vdupq_n_s32(value); }
    static I min(I a, I b) { return vminq_s32(a, b); }
    static I max(I a, I b) { return vmaxq_s32(a, b); }
    // Adds 1 to count and bit to mask in lanes with a >= b.
    static void countAtLeast(I a, I b, std::int32_t bit, I* count, I* mask) {
        const int32x4_t atLeast = vreinterpretq_s32_u32(vcgeq_s32(a, b));
        *count = vsubq_s32(*count, atLeast);
        *mask = vorrq_s32(*mask, vandq_s32(atLeast, vdupq_n_s32(bit)));
    }
    static bool allEqual(I a, std::int32_t value) {
        return vminvq_u32(vceqq_s32(a, vdupq_n_s32(value))) != 0;
    }
    static void storeInt(std::int32_t* to, I value) { vst1q_s32(to, value); }
    // out[j] lane g = keys[g * m + j], for j < m <= kSIZE.
    template <int kSIZE>
    static void loadGroups(const std::int32_t* keys, int m, I* out) {
        for (int j = 0; j < m; ++j) {
            const std::int32_t lanes[kLANES] = {keys[j], keys[m + j], keys[2 * m + j],
                                                keys[3 * m + j]};
            out[j] = vld1q_s32(lanes);
        }
    }
    // Prefetches are always inlined: a call that only prefetches counts as dead code otherwise.
    static inline __attribute__((always_inline)) void prefetch(const void* address) {
        __builtin_prefetch(address);
    }
    // Prefetches a line to be written.
    static inline __attribute__((always_inline)) void prefetchWrite(const void* address) {
        __builtin_prefetch(address, 1);
    }
    // Prefetches what is read once, past the outer caches: they are left to what comes back.
    static inline __attribute__((always_inline)) void prefetchFar(const void* address) {
        __builtin_prefetch(address, 0, 0);
    }
};

}  // namespace
}  // namespace nmexport
