// Eight lanes of AVX2 with FMA and F16C.
#pragma once

#include <immintrin.h>

#include "element.h"

namespace nmexport {
namespace {

struct Simd {
    static constexpr int kLANES = 8;
    static constexpr bool kCOMPRESSES = false;
    static constexpr std::size_t kREGISTERS = 16;
    using F = __m256;
    using I = __m256i;

    static F broadcast(float value) { return _mm256_set1_ps(value); }
    static F load(const float* from) { return _mm256_loadu_ps(from); }
    static F load(const Float16* from) {
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    }
    static F load(const BFloat16* from) {
        const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
    }
    static F load(const Int8* from) {
        const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
    }
    template <typename T>
    static F loadPartial(const T* from, int count) {
        T lanes[kLANES] = {};
        std::memcpy(lanes, from, sizeof(T) * static_cast<std::size_t>(count));
        return load(lanes);
    }
    static void store(float* to, F value) { _mm256_storeu_ps(to, value); }
    static void store(Float16* to, F value) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                         _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
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
        // Loads one by one: mitigations have made the instruction slower than that on many.
        return _mm256_setr_ps(from[index[0]], from[index[1]], from[index[2]], from[index[3]],
                              from[index[4]], from[index[5]], from[index[6]], from[index[7]]);
    }
    static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
    static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
    static F add(F a, F b) { return _mm256_add_ps(a, b); }
    static F sub(F a, F b) { return _mm256_sub_ps(a, b); }

    static I broadcastInt(std::int32_t value) { return _mm256_set1_epi32(value); }
    static I min(I a, I b) { return _mm256_min_epi32(a, b); }
    static I max(I a, I b) { return _mm256_max_epi32(a, b); }
    // Adds 1 to count and bit to mask in lanes with a >= b.
    static void countAtLeast(I a, I b, std::int32_t bit, I* count, I* mask) {
        const I less = _mm256_cmpgt_epi32(b, a);
        *count = _mm256_add_epi32(*count, _mm256_add_epi32(less, _mm256_set1_epi32(1)));
        *mask = _mm256_or_si256(*mask, _mm256_andnot_si256(less, _mm256_set1_epi32(bit)));
    }
    static bool allEqual(I a, std::int32_t value) {
        return _mm256_movemask_epi8(_mm256_cmpeq_epi32(a, broadcastInt(value))) == -1;
    }
    static void storeInt(std::int32_t* to, I value) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), value);
    }
    // out[j] lane g = keys[g * m + j], for j < m <= kSIZE.
    template <int kSIZE>
    static void loadGroups(const std::int32_t* keys, int m, I* out) {
        if constexpr (kSIZE >= kLANES) {
            if (m % kLANES == 0) {
                for (int j = 0; j < m; j += kLANES) transpose(keys + j, m, out + j);
                return;
            }
        }
        const I lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        const I offsets = _mm256_mullo_epi32(lane, broadcastInt(m));
        for (int j = 0; j < m; ++j) out[j] = _mm256_i32gather_epi32(keys + j, offsets, 4);
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
    // The 8x8 block of keys whose rows start every `stride` elements, columns first.
    static void transpose(const std::int32_t* keys, int stride, I* out) {
        __m256 row[8], pair[8], quad[8];
        for (int i = 0; i < 8; ++i) {
            row[i] = _mm256_loadu_ps(reinterpret_cast<const float*>(keys + i * stride));
        }
        for (int i = 0; i < 8; i += 2) {
            pair[i] = _mm256_unpacklo_ps(row[i], row[i + 1]);
            pair[i + 1] = _mm256_unpackhi_ps(row[i], row[i + 1]);
        }
        for (int i = 0; i < 8; i += 4) {
            quad[i] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0x44);
            quad[i + 1] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0xee);
            quad[i + 2] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0x44);
            quad[i + 3] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0xee);
        }
        for (int i = 0; i < 4; ++i) {
            out[i] = _mm256_castps_si256(_mm256_permute2f128_ps(quad[i], quad[i + 4], 0x20));
            out[i + 4] = _mm256_castps_si256(_mm256_permute2f128_ps(quad[i], quad[i + 4], 0x31));
        }
    }
};

}  // namespace
}  // namespace nmexport
