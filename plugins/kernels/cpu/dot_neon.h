// Products of bytes with Advanced SIMD, and with its dot product where the compiler targets it,
// beside simd_neon.h.
#pragma once

#include "dots.h"
#include "simd_neon.h"

namespace nmexport {
namespace {

struct Dot {
    static constexpr bool kUNSIGNED = false;
    static constexpr bool kTAKES_BYTES = false;  // as a nibble and another: bytes are signed
    using I = Simd::I;
    using F = Simd::F;
    using Word = int8x16_t;

    static I load(const void* from) {
        return vreinterpretq_s32_u8(vld1q_u8(static_cast<const std::uint8_t*>(from)));
    }
    static I loadPartial(const void* from, std::size_t count) {
        std::uint8_t bytes[sizeof(I)] = {};
        std::memcpy(bytes, from, count);
        return load(bytes);
    }
    static void store(void* to, I value) {
        vst1q_u8(static_cast<std::uint8_t*>(to), vreinterpretq_u8_s32(value));
    }
    static I flip(I bytes, std::uint8_t bits) {
        return vreinterpretq_s32_u8(veorq_u8(vreinterpretq_u8_s32(bytes), vdupq_n_u8(bits)));
    }
    static void interleave(const I* row, I* out) {
        uint8x16_t r[4];
        for (int i = 0; i < 4; ++i) r[i] = vreinterpretq_u8_s32(row[i]);
        const uint16x8_t low01 = vreinterpretq_u16_u8(vzip1q_u8(r[0], r[1]));
        const uint16x8_t high01 = vreinterpretq_u16_u8(vzip2q_u8(r[0], r[1]));
        const uint16x8_t low23 = vreinterpretq_u16_u8(vzip1q_u8(r[2], r[3]));
        const uint16x8_t high23 = vreinterpretq_u16_u8(vzip2q_u8(r[2], r[3]));
        out[0] = vreinterpretq_s32_u16(vzip1q_u16(low01, low23));
        out[1] = vreinterpretq_s32_u16(vzip2q_u16(low01, low23));
        out[2] = vreinterpretq_s32_u16(vzip1q_u16(high01, high23));
        out[3] = vreinterpretq_s32_u16(vzip2q_u16(high01, high23));
    }
    static I lowNibbles(I bytes) {
        return vreinterpretq_s32_u8(vandq_u8(vreinterpretq_u8_s32(bytes), vdupq_n_u8(0x0f)));
    }
    static I highNibbles(I bytes) {
        return vreinterpretq_s32_u8(vshrq_n_u8(vreinterpretq_u8_s32(bytes), 4));
    }
    static I firstBytes(I lanes) { return vshrq_n_s32(vshlq_n_s32(lanes, 24), 24); }
    static Word word(std::int32_t four) { return vreinterpretq_s8_s32(vdupq_n_s32(four)); }
    template <IntegerFormat>
    static I add(I sum, I weights, Word values) {
        const int8x16_t w = vreinterpretq_s8_s32(weights);
#ifdef __ARM_FEATURE_DOTPROD
        return vdotq_s32(sum, w, values);
#else
        const int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8(w), vget_low_s8(values)));
        const int32x4_t high = vpaddlq_s16(vmull_s8(vget_high_s8(w), vget_high_s8(values)));
        return vaddq_s32(sum, vpaddq_s32(low, high));
#endif
    }
    static I subtractProduct(I sum, I a, I b) { return vmlsq_s32(sum, a, b); }
    static F toFloat(I value) { return vcvtq_f32_s32(value); }

    // From the order of columns to that of interleaved sums: nibbles' even columns come first.
    template <int kVECTORS>
    static void shuffle(F* v) {
        if constexpr (kVECTORS == 8) {
            F from[8];
            for (int i = 0; i < 8; ++i) from[i] = v[i];
            for (int i = 0; i < 4; ++i) {
                v[i] = vuzp1q_f32(from[2 * i], from[2 * i + 1]);
                v[4 + i] = vuzp2q_f32(from[2 * i], from[2 * i + 1]);
            }
        }
    }
    // And back.
    template <int kVECTORS>
    static void unshuffle(F* v) {
        if constexpr (kVECTORS == 8) {
            F from[8];
            for (int i = 0; i < 8; ++i) from[i] = v[i];
            for (int i = 0; i < 4; ++i) {
                v[2 * i] = vzip1q_f32(from[i], from[4 + i]);
                v[2 * i + 1] = vzip2q_f32(from[i], from[4 + i]);
            }
        }
    }
};

}  // namespace
}  // namespace nmexport
