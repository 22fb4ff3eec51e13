// Products of bytes with AVX2, and with AVX-VNNI where the compiler targets it, beside simd_avx2.h.
#pragma once

#include "dots.h"
#include "simd_avx2.h"

namespace nmexport {
namespace {

struct Dot {
    static constexpr bool kUNSIGNED = true;  // weights are, values are not
    // True if add takes bytes, not nibbles alone.
#ifdef __AVXVNNI__
    static constexpr bool kTAKES_BYTES = true;
#else
    static constexpr bool kTAKES_BYTES = false;
#endif
    using I = Simd::I;
    using F = Simd::F;
#ifdef __AVXVNNI__
    using Word = I;
#else
    struct Word {
        I bytes;
        I even;  // values 0 and 2, in 16 bits
        I odd;   // values 1 and 3
    };
#endif

    static I load(const void* from) {
        return _mm256_loadu_si256(static_cast<const __m256i*>(from));
    }
    static I loadPartial(const void* from, std::size_t count) {
        unsigned char bytes[sizeof(I)] = {};
        std::memcpy(bytes, from, count);
        return load(bytes);
    }
    static void store(void* to, I value) { _mm256_storeu_si256(static_cast<__m256i*>(to), value); }
    static I flip(I bytes, std::uint8_t bits) {
        return _mm256_xor_si256(bytes, _mm256_set1_epi8(static_cast<char>(bits)));
    }
    // Interleaves each 16 bytes of four rows: a0 b0 c0 d0 a1 ... d3 | a4 ... | a8 ... | a12 ...
    static void interleave(const I* row, I* out) {
        const I low01 = _mm256_unpacklo_epi8(row[0], row[1]);
        const I high01 = _mm256_unpackhi_epi8(row[0], row[1]);
        const I low23 = _mm256_unpacklo_epi8(row[2], row[3]);
        const I high23 = _mm256_unpackhi_epi8(row[2], row[3]);
        out[0] = _mm256_unpacklo_epi16(low01, low23);
        out[1] = _mm256_unpackhi_epi16(low01, low23);
        out[2] = _mm256_unpacklo_epi16(high01, high23);
        out[3] = _mm256_unpackhi_epi16(high01, high23);
    }
    static I lowNibbles(I bytes) { return _mm256_and_si256(bytes, _mm256_set1_epi8(0x0f)); }
    static I highNibbles(I bytes) { return lowNibbles(_mm256_srli_epi16(bytes, 4)); }
    static I firstBytes(I lanes) { return _mm256_and_si256(lanes, Simd::broadcastInt(0xff)); }
#ifdef __AVXVNNI__
    static Word word(std::int32_t four) { return Simd::broadcastInt(four); }
    template <IntegerFormat>
    static I add(I sum, I weights, Word values) {
        return _mm256_dpbusd_avx_epi32(sum, weights, values);
    }
#else
    static Word word(std::int32_t four) {
        const I bytes = Simd::broadcastInt(four);
        return {bytes, _mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8),
                _mm256_srai_epi16(bytes, 8)};
    }
    // Sums of two products of bytes can exceed 16 bits, where the instruction for them saturates:
    // bytes are widened first, and only nibbles are not.
    template <IntegerFormat kFORMAT>
    static I add(I sum, I weights, const Word& values) {
        if constexpr (kFORMAT == IntegerFormat::kINT8) {
            const I even = _mm256_and_si256(weights, _mm256_set1_epi16(0xff));
            const I odd = _mm256_srli_epi16(weights, 8);
            sum = _mm256_add_epi32(sum, _mm256_madd_epi16(even, values.even));
            return _mm256_add_epi32(sum, _mm256_madd_epi16(odd, values.odd));
        } else {
            const I pairs = _mm256_maddubs_epi16(weights, values.bytes);
            return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
        }
    }
#endif
    static I subtractProduct(I sum, I a, I b) {
        return _mm256_sub_epi32(sum, _mm256_mullo_epi32(a, b));
    }
    // The sums over the upper halves of bytes, from those over whole bytes and over lower halves.
    static I upperPart(I whole, I lower) {
        return _mm256_srai_epi32(_mm256_sub_epi32(whole, lower), 4);
    }
    static F toFloat(I value) { return _mm256_cvtepi32_ps(value); }

    // From the order of columns to that of interleaved sums.
    template <int kVECTORS>
    static void shuffle(F* v) {
        if constexpr (kVECTORS == 8) {
            F even[4], odd[4];
            for (int i = 0; i < 4; ++i) {
                even[i] = inOrder(_mm256_shuffle_ps(v[2 * i], v[2 * i + 1], 0x88));
                odd[i] = inOrder(_mm256_shuffle_ps(v[2 * i], v[2 * i + 1], 0xdd));
            }
            spread(even, v);
            spread(odd, v + 4);
        } else {
            const F from[4] = {v[0], v[1], v[2], v[3]};
            spread(from, v);
        }
    }
    // And back.
    template <int kVECTORS>
    static void unshuffle(F* v) {
        if constexpr (kVECTORS == 8) {
            F even[4], odd[4];
            gather(v, even);
            gather(v + 4, odd);
            for (int i = 0; i < 4; ++i) {
                const F low = _mm256_unpacklo_ps(even[i], odd[i]);
                const F high = _mm256_unpackhi_ps(even[i], odd[i]);
                v[2 * i] = _mm256_permute2f128_ps(low, high, 0x20);
                v[2 * i + 1] = _mm256_permute2f128_ps(low, high, 0x31);
            }
        } else {
            const F from[4] = {v[0], v[1], v[2], v[3]};
            gather(from, v);
        }
    }

  private:
    // Swaps the middle quarters.
    static F inOrder(F v) {
        return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(v), 0xd8));
    }
    static void spread(const F* from, F* out) {
        out[0] = _mm256_permute2f128_ps(from[0], from[2], 0x20);
        out[1] = _mm256_permute2f128_ps(from[0], from[2], 0x31);
        out[2] = _mm256_permute2f128_ps(from[1], from[3], 0x20);
        out[3] = _mm256_permute2f128_ps(from[1], from[3], 0x31);
    }
    static void gather(const F* from, F* out) {
        out[0] = _mm256_permute2f128_ps(from[0], from[1], 0x20);
        out[1] = _mm256_permute2f128_ps(from[2], from[3], 0x20);
        out[2] = _mm256_permute2f128_ps(from[0], from[1], 0x31);
        out[3] = _mm256_permute2f128_ps(from[2], from[3], 0x31);
    }
};

}  // namespace
}  // namespace nmexport
