// Ranking inside one group: keys, networks, the tie rule. Pure functions, the same on host and
// device.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define NM_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define NM_HOST_DEVICE inline
#endif

namespace nmexport::cuda {

NM_HOST_DEVICE uint32_t bitsOf(float value) {
#if defined(__CUDA_ARCH__)
    return __float_as_uint(value);
#else
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits;
#endif
}

NM_HOST_DEVICE uint32_t minOf(uint32_t a, uint32_t b) {
    return a < b ? a : b;
}

NM_HOST_DEVICE uint32_t maxOf(uint32_t a, uint32_t b) {
    return a < b ? b : a;
}

//! Rank key of |z|: larger key, larger score; every NaN shares the topmost key; never 0, so key - 1
//! is a key too.
NM_HOST_DEVICE uint32_t magnitudeKey(float z) {
    return minOf(bitsOf(z) & 0x7fffffffU, 0x7f800001U) + 1U;
}

//! Rank key of any float, for scores that a scale may have made negative. Same promises as
//! magnitudeKey.
NM_HOST_DEVICE uint32_t orderedKey(float score) {
    uint32_t const bits = bitsOf(score);
    uint32_t const magnitude = bits & 0x7fffffffU;
    if (magnitude > 0x7f800000U) {
        return 0xffffffffU;
    }
    if (magnitude == 0U) {
        return 0x80000000U;  // -0 equals +0
    }
    return (bits >> 31) != 0U ? ~bits : bits | 0x80000000U;
}

//! One float32 product, never contracted into a fused multiply-add.
NM_HOST_DEVICE float scaledScore(float z, float scale) {
    float const magnitude = z < 0.0F ? -z : z;
#if defined(__CUDA_ARCH__)
    return __fmul_rn(magnitude, scale);
#else
    float volatile product = magnitude * scale;
    return product;
#endif
}

//! True where the other element precedes this one in the ranking; of equal keys the earlier in the
//! group wins.
NM_HOST_DEVICE bool precedes(uint32_t otherKey, uint32_t key, bool otherIsEarlier) {
    return otherKey > key - (otherIsEarlier ? 1U : 0U);
}

//! Ascending order by Batcher's odd-even merge network; all indices are compile-time once unrolled.
template <int COUNT>
NM_HOST_DEVICE void sortAscending(uint32_t (&keys)[COUNT]) {
#pragma unroll
    for (int run = 1; run < COUNT; run *= 2) {
#pragma unroll
        for (int gap = run; gap >= 1; gap /= 2) {
#pragma unroll
            for (int low = 0; low < COUNT; ++low) {
                int const high = low + gap;
                bool const paired = low >= gap % run && ((low - gap % run) / gap) % 2 == 0;
                if (high < COUNT && paired && low / (2 * run) == high / (2 * run)) {
                    uint32_t const smaller = minOf(keys[low], keys[high]);
                    keys[high] = maxOf(keys[low], keys[high]);
                    keys[low] = smaller;
                }
            }
        }
    }
}

//! The n-th largest of COUNT keys (COUNT a power of two). Half-kept groups sort two halves and
//! merge once.
template <int COUNT>
NM_HOST_DEVICE uint32_t nthLargest(uint32_t const (&keys)[COUNT], int n) {
    constexpr int kHALF = COUNT / 2;
    if (2 * n == COUNT) {
        uint32_t left[kHALF];
        uint32_t right[kHALF];
#pragma unroll
        for (int i = 0; i < kHALF; ++i) {
            left[i] = keys[i];
            right[i] = keys[kHALF + i];
        }
        sortAscending<kHALF>(left);
        sortAscending<kHALF>(right);
        uint32_t smallestKept = 0xffffffffU;
#pragma unroll
        for (int i = 0; i < kHALF; ++i) {
            smallestKept = minOf(smallestKept, maxOf(left[i], right[kHALF - 1 - i]));
        }
        return smallestKept;
    }
    uint32_t sorted[COUNT];
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        sorted[i] = keys[i];
    }
    sortAscending<COUNT>(sorted);
    uint32_t chosen = 0U;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        chosen = i == COUNT - n ? sorted[i] : chosen;
    }
    return chosen;
}

//! Bit i set where element i of a group of COUNT <= 32 keys is among the n kept.
template <int COUNT>
NM_HOST_DEVICE uint32_t keepMask(uint32_t const (&keys)[COUNT], int n) {
    uint32_t const threshold = nthLargest<COUNT>(keys, n);
    int ties = n;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        ties -= keys[i] > threshold ? 1 : 0;
    }
    uint32_t mask = 0U;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        bool const tied = keys[i] == threshold && ties > 0;
        ties -= tied ? 1 : 0;
        mask |= (keys[i] > threshold || tied) ? 1U << i : 0U;
    }
    return mask;
}

//! How many of a group's m keys precede element `index`; it is kept where this is below n. Any m.
NM_HOST_DEVICE int rankInGroup(uint32_t const* keys, int m, int index) {
    uint32_t const key = keys[index];
    int rank = 0;
    for (int i = 0; i < m; ++i) {
        rank += precedes(keys[i], key, i < index) ? 1 : 0;
    }
    return rank;
}

//! Counts, for the two elements of a lane, the elements of the group that precede them: groups of
//! 16 spread over 8 lanes. Keys are those of magnitudeKey or orderedKey.
struct WideRank {
    uint32_t low;   //!< key of the earlier element
    uint32_t high;  //!< key of the later one
    int beforeLow;
    int beforeHigh;

    NM_HOST_DEVICE WideRank(uint32_t lowKey, uint32_t highKey)
        : low{lowKey},
          high{highKey},
          beforeLow{precedes(highKey, lowKey, false) ? 1 : 0},
          beforeHigh{precedes(lowKey, highKey, true) ? 1 : 0} {}

    //! Another lane's keys; `otherIsEarlier` where its elements come first in the group.
    NM_HOST_DEVICE void meet(uint32_t otherLow, uint32_t otherHigh, bool otherIsEarlier) {
        uint32_t const lowBar = low - (otherIsEarlier ? 1U : 0U);
        uint32_t const highBar = high - (otherIsEarlier ? 1U : 0U);
        beforeLow += (otherLow > lowBar ? 1 : 0) + (otherHigh > lowBar ? 1 : 0);
        beforeHigh += (otherLow > highBar ? 1 : 0) + (otherHigh > highBar ? 1 : 0);
    }
};

//! Two 16-bit floats of one word ranked at once, for groups of 16 spread over 8 lanes, two elements
//! per lane. Keys are 15-bit magnitudes in each half, NaN canonical; bit 15 of a half is free to
//! catch a borrow.
NM_HOST_DEVICE uint32_t packedKeys(uint32_t word, uint32_t nanKey) {
    uint32_t const keys = word & 0x7fff7fffU;
#if defined(__CUDA_ARCH__)
    return __vminu2(keys, nanKey * 0x00010001U);
#else
    return minOf(keys & 0xffffU, nanKey) | minOf(keys >> 16, nanKey) << 16;
#endif
}

//! Counts, for the two elements of a lane, the group's elements that do not precede them.
struct PackedRank {
    uint32_t low;   //!< own low key in both halves, guard bits set
    uint32_t high;  //!< own high key in both halves, guard bits set
    uint32_t notBeforeLow{0};
    uint32_t notBeforeHigh{0};

    NM_HOST_DEVICE explicit PackedRank(uint32_t keys)
        : low{(keys & 0xffffU) * 0x00010001U | 0x80008000U},
          high{(keys >> 16) * 0x00010001U | 0x80008000U} {}

    //! Another lane's keys; `otherIsEarlier` where its elements come first in the group. At most 7
    //! times.
    NM_HOST_DEVICE void meet(uint32_t otherKeys, bool otherIsEarlier) {
        uint32_t const bar = otherKeys + (otherIsEarlier ? 0x00010001U : 0U);
        notBeforeLow = notBeforeLow >> 1 | ((low - bar) & 0x80008000U);
        notBeforeHigh = notBeforeHigh >> 1 | ((high - bar) & 0x80008000U);
    }

    //! After meeting all 7: is the low (high) element among the n kept of 16? The low one is the
    //! earlier.
    NM_HOST_DEVICE bool keepsLow(int n) const {
        return countBits(notBeforeLow) + (low >= high ? 1 : 0) + n >= 16;
    }

    NM_HOST_DEVICE bool keepsHigh(int n) const {
        return countBits(notBeforeHigh) + (high > low ? 1 : 0) + n >= 16;
    }

  private:
    NM_HOST_DEVICE static int countBits(uint32_t bits) {
#if defined(__CUDA_ARCH__)
        return __popc(bits);
#else
        return __builtin_popcount(bits);
#endif
    }
};

NM_HOST_DEVICE uint32_t minOfHalves(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
    return __vminu2(a, b);
#else
    return minOf(a & 0xffffU, b & 0xffffU) | minOf(a >> 16, b >> 16) << 16;
#endif
}

NM_HOST_DEVICE uint32_t maxOfHalves(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
    return __vmaxu2(a, b);
#else
    return maxOf(a & 0xffffU, b & 0xffffU) | maxOf(a >> 16, b >> 16) << 16;
#endif
}

//! Batcher's network for 8 keys on both halves of each word at once.
NM_HOST_DEVICE void sortHalvesAscending(uint32_t (&keys)[8]) {
    constexpr int kPAIRS[19][2] = {{0, 1}, {2, 3}, {4, 5}, {6, 7}, {0, 2}, {1, 3}, {4, 6},
                                   {5, 7}, {1, 2}, {5, 6}, {0, 4}, {1, 5}, {2, 6}, {3, 7},
                                   {2, 4}, {3, 5}, {1, 2}, {3, 4}, {5, 6}};
#pragma unroll
    for (int i = 0; i < 19; ++i) {
        uint32_t const a = keys[kPAIRS[i][0]];
        uint32_t const b = keys[kPAIRS[i][1]];
        keys[kPAIRS[i][0]] = minOfHalves(a, b);
        keys[kPAIRS[i][1]] = maxOfHalves(a, b);
    }
}

//! Of a group's elements at or above the threshold, those kept: all above it, then the first of
//! those at it.
NM_HOST_DEVICE uint32_t firstTies(uint32_t atOrAbove, uint32_t above, int n) {
#if defined(__CUDA_ARCH__)
    int extra = __popc(atOrAbove) - n;
#else
    int extra = __builtin_popcount(atOrAbove) - n;
#endif
    uint32_t ties = atOrAbove & ~above;
    for (; extra > 0; --extra) {
#if defined(__CUDA_ARCH__)
        ties &= ~(0x80000000U >> __clz(static_cast<int>(ties)));
#else
        ties &= ~(0x80000000U >> __builtin_clz(ties));
#endif
    }
    return above | ties;
}

//! 8 of 16, two groups at once: word i holds the packed keys (see packedKeys) of element i of group
//! A (low) and B (high). Bit i of the low (high) half of the result is set where A (B) keeps
//! element i.
NM_HOST_DEVICE uint32_t keepHalfOfPair(uint32_t const (&keys)[16]) {
    uint32_t left[8];
    uint32_t right[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        left[i] = keys[i];
        right[i] = keys[8 + i];
    }
    sortHalvesAscending(left);
    sortHalvesAscending(right);
    uint32_t threshold = 0xffffffffU;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        threshold = minOfHalves(threshold, maxOfHalves(left[i], right[7 - i]));
    }
    // Keys have 15 bits: bit 15 of a half, set before a subtraction, survives it where nothing was
    // borrowed.
    constexpr uint32_t kGUARD = 0x80008000U;
    uint32_t atOrAbove = 0;
    uint32_t above = 0;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        uint32_t const guarded = keys[i] | kGUARD;
        atOrAbove = atOrAbove >> 1 | ((guarded - threshold) & kGUARD);
        above = above >> 1 | ((guarded - threshold - 0x00010001U) & kGUARD);
    }
    return firstTies(atOrAbove & 0xffffU, above & 0xffffU, 8) |
           firstTies(atOrAbove >> 16, above >> 16, 8) << 16;
}

}  // namespace nmexport::cuda
