// Sixteen lanes of AVX-512 (F, BW, DQ, VL).
#pragma once

#include <immintrin.h>

#include "element.h"

namespace nmexport {
namespace {

struct Simd {
    static constexpr int kLANES = 16;
    static constexpr bool kCOMPRESSES = true;
    static constexpr std::size_t kREGISTERS = 32;
    using F = __m512;
    using I = __m512i;

    static F broadcast(float value) { return _mm512_set1_ps(value); }
    static F load(const float* from) { return _mm512_loadu_ps(from); }
    static F load(const Float16* from) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    }
    static F load(const BFloat16* from) {
        return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    }
    static F load(const Int8* from) {
        return widen8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    }
    static F loadPartial(const Int8* from, int count) {
        return widen8(_mm_maskz_loadu_epi8(firstLanes(count), from));
    }
    static F loadPartial(const float* from, int count) {
        return _mm512_maskz_loadu_ps(firstLanes(count), from);
    }
    static F loadPartial(const Float16* from, int count) {
        return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(firstLanes(count), from));
    }
    static F loadPartial(const BFloat16* from, int count) {
        return widen(_mm256_maskz_loadu_epi16(firstLanes(count), from));
    }
    static void store(float* to, F value) { _mm512_storeu_ps(to, value); }
    static void store(Float16* to, F value) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), narrowToFloat16(value));
    }
    static void store(BFloat16* to, F value) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), narrowToBFloat16(value));
    }
    static void storePartial(float* to, F value, int count) {
        _mm512_mask_storeu_ps(to, firstLanes(count), value);
    }
    static void storePartial(Float16* to, F value, int count) {
        _mm256_mask_storeu_epi16(to, firstLanes(count), narrowToFloat16(value));
    }
    static void storePartial(BFloat16* to, F value, int count) {
        _mm256_mask_storeu_epi16(to, firstLanes(count), narrowToBFloat16(value));
    }
    static F gather(const float* from, const std::int32_t* index) {
        return _mm512_i32gather_ps(_mm512_loadu_si512(index), from, 4);
    }
    static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    static F add(F a, F b) { return _mm512_add_ps(a, b); }
    static F sub(F a, F b) { return _mm512_sub_ps(a, b); }

    static I broadcastInt(std::int32_t value) { return _mm512_set1_epi32(value); }
    static I min(I a, I b) { return _mm512_min_epi32(a, b); }
    static I max(I a, I b) { return _mm512_max_epi32(a, b); }
    // Adds 1 to count and bit to mask in lanes with a >= b.
    static void countAtLeast(I a, I b, std::int32_t bit, I* count, I* mask) {
        const __mmask16 atLeast = _mm512_cmpge_epi32_mask(a, b);
        *count = _mm512_mask_add_epi32(*count, atLeast, *count, _mm512_set1_epi32(1));
        *mask = _mm512_mask_or_epi32(*mask, atLeast, *mask, _mm512_set1_epi32(bit));
    }
    static bool allEqual(I a, std::int32_t value) {
        return _mm512_cmpneq_epi32_mask(a, broadcastInt(value)) == 0;
    }
    static void storeInt(std::int32_t* to, I value) { _mm512_storeu_si512(to, value); }
    // out[j] lane g = keys[g * m + j], for j < m <= kSIZE.
    template <int kSIZE>
    static void loadGroups(const std::int32_t* keys, int m, I* out) {
        if constexpr (kSIZE >= kLANES) {
            if (m % kLANES == 0) {
                for (int j = 0; j < m; j += kLANES) transpose(keys + j, m, out + j);
                return;
            }
        }
        const I offsets = _mm512_mullo_epi32(lanes(), broadcastInt(m));
        for (int j = 0; j < m; ++j) out[j] = _mm512_i32gather_epi32(offsets, keys + j, 4);
    }
    // The values at the set bits of `mask`, one after the other; nothing else is read. A whole
    // vector is written.
    static void compress(const float* from, std::uint32_t mask, float* to) {
        const __mmask16 lanes = static_cast<__mmask16>(mask);
        store(to, _mm512_maskz_compress_ps(lanes, _mm512_maskz_loadu_ps(lanes, from)));
    }
    static void compress(const std::int32_t* from, std::uint32_t mask, std::int32_t* to) {
        const __mmask16 lanes = static_cast<__mmask16>(mask);
        storeInt(to, _mm512_maskz_compress_epi32(lanes, _mm512_maskz_loadu_epi32(lanes, from)));
    }
    // first + i at the set bits i.
    static void compressIndex(std::int32_t first, std::uint32_t mask, std::int32_t* to) {
        const I index = _mm512_add_epi32(lanes(), broadcastInt(first));
        storeInt(to, _mm512_maskz_compress_epi32(static_cast<__mmask16>(mask), index));
    }
    // Prefetches are always inlined: a call that only prefetches counts as dead code otherwise.
    static inline __attribute__((always_inline)) void prefetch(const void* address) {
        _mm_prefetch(static_cast<const char*>(address), _MM_HINT_T0);
    }
    // Prefetches a line to be written.
    static inline __attribute__((always_inline)) void prefetchWrite(const void* address) {
        __builtin_prefetch(address, 1);
    }
    // Into the second-level cache.
    static inline __attribute__((always_inline)) void prefetchFar(const void* address) {
        _mm_prefetch(static_cast<const char*>(address), _MM_HINT_T1);
    }

  private:
    static I lanes() {
        return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    }
    static __mmask16 firstLanes(int count) { return static_cast<__mmask16>((1u << count) - 1u); }
    static F widen8(__m128i bytes) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)); }
    static F widen(__m256i bits) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    }
    static __m256i narrowToFloat16(F value) {
        return _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT);
    }
    // Round to nearest even by integer arithmetic; NaN stays NaN and turns quiet.
    static __m256i narrowToBFloat16(F value) {
        const I bits = _mm512_castps_si512(value);
        const I high = _mm512_srli_epi32(bits, 16);
        const I odd = _mm512_and_si512(high, broadcastInt(1));
        const I biased = _mm512_add_epi32(bits, _mm512_add_epi32(odd, broadcastInt(0x7fff)));
        const __mmask16 isNan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
        const I rounded =
            _mm512_mask_or_epi32(_mm512_srli_epi32(biased, 16), isNan, high, broadcastInt(0x40));
        return _mm512_cvtepi32_epi16(rounded);
    }
    // The 16x16 block of keys whose rows start every `stride` elements, columns first.
    static void transpose(const std::int32_t* keys, int stride, I* out) {
        I row[16], pair[16], quad[16];
        for (int i = 0; i < 16; ++i) row[i] = _mm512_loadu_si512(keys + i * stride);
        for (int i = 0; i < 16; i += 2) {
            pair[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);
            pair[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
        }
        // quad[4i + c] holds column c of each 4-column band, for rows 4i .. 4i+3.
        for (int i = 0; i < 16; i += 4) {
            quad[i] = _mm512_unpacklo_epi64(pair[i], pair[i + 2]);
            quad[i + 1] = _mm512_unpackhi_epi64(pair[i], pair[i + 2]);
            quad[i + 2] = _mm512_unpacklo_epi64(pair[i + 1], pair[i + 3]);
            quad[i + 3] = _mm512_unpackhi_epi64(pair[i + 1], pair[i + 3]);
        }
        for (int c = 0; c < 4; ++c) {
            const I evenTop = _mm512_shuffle_i32x4(quad[c], quad[4 + c], 0x88);
            const I oddTop = _mm512_shuffle_i32x4(quad[c], quad[4 + c], 0xdd);
            const I evenBottom = _mm512_shuffle_i32x4(quad[8 + c], quad[12 + c], 0x88);
            const I oddBottom = _mm512_shuffle_i32x4(quad[8 + c], quad[12 + c], 0xdd);
            out[c] = _mm512_shuffle_i32x4(evenTop, evenBottom, 0x88);
            out[8 + c] = _mm512_shuffle_i32x4(evenTop, evenBottom, 0xdd);
            out[4 + c] = _mm512_shuffle_i32x4(oddTop, oddBottom, 0x88);
            out[12 + c] = _mm512_shuffle_i32x4(oddTop, oddBottom, 0xdd);
        }
    }
};

}  // namespace
}  // namespace nmexport
