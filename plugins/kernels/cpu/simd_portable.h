// Eight lanes in plain C++: the fallback, and the reference the other variants must equal.
#pragma once

#include "element.h"

namespace nmexport {
namespace {

struct Simd {
    static constexpr int kLANES = 8;
    static constexpr bool kCOMPRESSES = false;
    static constexpr std::size_t kREGISTERS = 16;
    struct F {
        float lane[kLANES];
    };
    struct I {
        std::int32_t lane[kLANES];
    };

    static F broadcast(float value) {
        F out;
        for (float& lane : out.lane) lane = value;
        return out;
    }
    static F load(const float* from) {
        F out;
        std::memcpy(out.lane, from, sizeof out.lane);
        return out;
    }
    template <typename T>
    static F load(const T* from) {
        F out;
        for (int i = 0; i < kLANES; ++i) out.lane[i] = toFloat(from[i]);
        return out;
    }
    template <typename T>
    static F loadPartial(const T* from, int count) {
        F out = broadcast(0.0f);
        for (int i = 0; i < count; ++i) out.lane[i] = toFloat(from[i]);
        return out;
    }
    template <typename T>
    static void store(T* to, F value) {
        for (int i = 0; i < kLANES; ++i) fromFloat(value.lane[i], to + i);
    }
    template <typename T>
    static void storePartial(T* to, F value, int count) {
        for (int i = 0; i < count; ++i) fromFloat(value.lane[i], to + i);
    }
    static F gather(const float* from, const std::int32_t* index) {
        F out;
        for (int i = 0; i < kLANES; ++i) out.lane[i] = from[index[i]];
        return out;
    }
    static F fma(F a, F b, F c) {
        for (int i = 0; i < kLANES; ++i) {
            c.lane[i] = __builtin_fmaf(a.lane[i], b.lane[i], c.lane[i]);
        }
        return c;
    }
    static F mul(F a, F b) {
        for (int i = 0; i < kLANES; ++i) a.lane[i] *= b.lane[i];
        return a;
    }
    static F add(F a, F b) {
        for (int i = 0; i < kLANES; ++i) a.lane[i] += b.lane[i];
        return a;
    }

    static F sub(F a, F b) {
        for (int i = 0; i < kLANES; ++i) a.lane[i] -= b.lane[i];
        return a;
    }

    static I broadcastInt(std::int32_t value) {
        I out;
        for (std::int32_t& lane : out.lane) lane = value;
        return out;
    }
    static I min(I a, I b) {
        for (int i = 0; i < kLANES; ++i) a.lane[i] = a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i];
        return a;
    }
    static I max(I a, I b) {
        for (int i = 0; i < kLANES; ++i) a.lane[i] = a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i];
        return a;
    }
    // Adds 1 to count and bit to mask in lanes with a >= b.
    static void countAtLeast(I a, I b, std::int32_t bit, I* count, I* mask) {
        for (int i = 0; i < kLANES; ++i) {
            const bool atLeast = a.lane[i] >= b.lane[i];
            count->lane[i] += atLeast;
            mask->lane[i] |= atLeast ? bit : 0;
        }
    }
    static bool allEqual(I a, std::int32_t value) {
        bool equal = true;
        for (std::int32_t lane : a.lane) equal = equal && lane == value;
        return equal;
    }
    static void storeInt(std::int32_t* to, I value) {
        std::memcpy(to, value.lane, sizeof value.lane);
    }
    // out[j] lane g = keys[g * m + j], for j < m <= kSIZE.
    template <int kSIZE>
    static void loadGroups(const std::int32_t* keys, int m, I* out) {
        for (int j = 0; j < m; ++j) {
            for (int g = 0; g < kLANES; ++g) out[j].lane[g] = keys[g * m + j];
        }
    }
    static inline __attribute__((always_inline)) void prefetch(const void*) {}
    static inline __attribute__((always_inline)) void prefetchWrite(const void*) {}
    static inline __attribute__((always_inline)) void prefetchFar(const void*) {}
};

}  // namespace
}  // namespace nmexport
