// Products of bytes with AVX-512 VNNI, beside simd_avx512.h.
#pragma once

#include "dots.h"
#include "simd_avx512.h"

namespace nmexport {
namespace {

struct Dot {
    static constexpr bool kUNSIGNED = true;     // weights are, values are not
    static constexpr bool kTAKES_BYTES = true;  // add does, not nibbles alone
    using I = Simd::I;
    using F = Simd::F;
    using Word = I;

    static I load(const void* from) { return _mm512_loadu_si512(from); }
    // count < 64.
    static I loadPartial(const void* from, std::size_t count) {
        return _mm512_maskz_loadu_epi8((std::uint64_t{1} << count) - 1, from);
    }
    static void store(void* to, I value) { _mm512_storeu_si512(to, value); }
    static I flip(I bytes, std::uint8_t bits) {
        return _mm512_xor_si512(bytes, _mm512_set1_epi8(static_cast<char>(bits)));
    }
    // Interleaves each 16 bytes of four rows: a0 b0 c0 d0 a1 ... d3 | a4 ... | a8 ... | a12 ...
    static void interleave(const I* row, I* out) {
        const I low01 = _mm512_unpacklo_epi8(row[0], row[1]);
        const I high01 = _mm512_unpackhi_epi8(row[0], row[1]);
        const I low23 = _mm512_unpacklo_epi8(row[2], row[3]);
        const I high23 = _mm512_unpackhi_epi8(row[2], row[3]);
        out[0] = _mm512_unpacklo_epi16(low01, low23);
        out[1] = _mm512_unpackhi_epi16(low01, low23);
        out[2] = _mm512_unpacklo_epi16(high01, high23);
        out[3] = _mm512_unpackhi_epi16(high01, high23);
    }
    static I lowNibbles(I bytes) { return _mm512_and_si512(bytes, _mm512_set1_epi8(0x0f)); }
    static I highNibbles(I bytes) { return lowNibbles(_mm512_srli_epi16(bytes, 4)); }
    static I firstBytes(I lanes) { return _mm512_and_si512(lanes, Simd::broadcastInt(0xff)); }
    static Word word(std::int32_t four) { return Simd::broadcastInt(four); }
    // In assembler: of the intrinsic g++ 12 keeps copies of the sums, so that those of a tile do
    // not fit the registers, and a prompt takes 1.4 times as long.
    template <IntegerFormat>
    static I add(I sum, I weights, Word values) {
        asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(weights), "v"(values));
        return sum;
    }
    static I subtractProduct(I sum, I a, I b) {
        return _mm512_sub_epi32(sum, _mm512_mullo_epi32(a, b));
    }
    // The sums over the upper halves of bytes, from those over whole bytes and over lower halves.
    static I upperPart(I whole, I lower) {
        return _mm512_srai_epi32(_mm512_sub_epi32(whole, lower), 4);
    }
    static F toFloat(I value) { return _mm512_cvtepi32_ps(value); }

    // From the order of columns to that of interleaved sums.
    template <int kVECTORS>
    static void shuffle(F* v) {
        if constexpr (kVECTORS == 8) {
            F even[4], odd[4];
            for (int i = 0; i < 4; ++i) {
                even[i] = _mm512_permutex2var_ps(v[2 * i], evens(0), v[2 * i + 1]);
                odd[i] = _mm512_permutex2var_ps(v[2 * i], evens(1), v[2 * i + 1]);
            }
            transpose(even, v);
            transpose(odd, v + 4);
        } else {
            const F from[4] = {v[0], v[1], v[2], v[3]};
            transpose(from, v);
        }
    }
    // And back.
    template <int kVECTORS>
    static void unshuffle(F* v) {
        if constexpr (kVECTORS == 8) {
            const I low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            const I high = _mm512_add_epi32(low, Simd::broadcastInt(8));
            F even[4], odd[4];
            transpose(v, even);
            transpose(v + 4, odd);
            for (int i = 0; i < 4; ++i) {
                v[2 * i] = _mm512_permutex2var_ps(even[i], low, odd[i]);
                v[2 * i + 1] = _mm512_permutex2var_ps(even[i], high, odd[i]);
            }
        } else {
            shuffle<kVECTORS>(v);  // its own inverse
        }
    }

  private:
    static I evens(std::int32_t first) {
        const I even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        return _mm512_add_epi32(even, Simd::broadcastInt(first));
    }
    // Quarters: out[i][j] = from[j][i].
    static void transpose(const F* from, F* out) {
        const F a = _mm512_shuffle_f32x4(from[0], from[1], 0x44);
        const F b = _mm512_shuffle_f32x4(from[0], from[1], 0xee);
        const F c = _mm512_shuffle_f32x4(from[2], from[3], 0x44);
        const F d = _mm512_shuffle_f32x4(from[2], from[3], 0xee);
        out[0] = _mm512_shuffle_f32x4(a, c, 0x88);
        out[1] = _mm512_shuffle_f32x4(a, c, 0xdd);
        out[2] = _mm512_shuffle_f32x4(b, d, 0x88);
        out[3] = _mm512_shuffle_f32x4(b, d, 0xdd);
    }
};

}  // namespace
}  // namespace nmexport
