// Ranking inside one group: keys, networks, the tie rule. Pure functions, the same on host and device.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define NM_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define NM_HOST_DEVICE inline
#endif

namespace nmexport::cuda
{

NM_HOST_DEVICE uint32_t bitsOf(float value)
{
#if defined(__CUDA_ARCH__)
    return __float_as_uint(value);
#else
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits;
#endif
}

NM_HOST_DEVICE uint32_t minOf(uint32_t a, uint32_t b)
{
    return a < b ? a : b;
}

NM_HOST_DEVICE uint32_t maxOf(uint32_t a, uint32_t b)
{
    return a < b ? b : a;
}

//! Rank key of |z|: larger key, larger score; every NaN shares the topmost key; never 0, so key - 1 is a key too.
NM_HOST_DEVICE uint32_t magnitudeKey(float z)
{
    return minOf(bitsOf(z) & 0x7fffffffU, 0x7f800001U) + 1U;
}

//! Rank key of any float, for scores that a scale may have made negative. Same promises as magnitudeKey.
NM_HOST_DEVICE uint32_t orderedKey(float score)
{
    uint32_t const bits = bitsOf(score);
    uint32_t const magnitude = bits & 0x7fffffffU;
    if (magnitude > 0x7f800000U)
    {
        return 0xffffffffU;
    }
    if (magnitude == 0U)
    {
        return 0x80000000U; // -0 equals +0
    }
    return (bits >> 31) != 0U ? ~bits : bits | 0x80000000U;
}

//! One float32 product, never contracted into a fused multiply-add.
NM_HOST_DEVICE float scaledScore(float z, float scale)
{
    float const magnitude = z < 0.0F ? -z : z;
#if defined(__CUDA_ARCH__)
    return __fmul_rn(magnitude, scale);
#else
    float volatile product = magnitude * scale;
    return product;
#endif
}

//! True where the other element precedes this one in the ranking; of equal keys the earlier in the group wins.
NM_HOST_DEVICE bool precedes(uint32_t otherKey, uint32_t key, bool otherIsEarlier)
{
    return otherKey > key - (otherIsEarlier ? 1U : 0U);
}

//! Ascending order by Batcher's odd-even merge network; all indices are compile-time once unrolled.
template <int COUNT>
NM_HOST_DEVICE void sortAscending(uint32_t (&keys)[COUNT])
{
#pragma unroll
    for (int run = 1; run < COUNT; run *= 2)
    {
#pragma unroll
        for (int gap = run; gap >= 1; gap /= 2)
        {
#pragma unroll
            for (int low = 0; low < COUNT; ++low)
            {
                int const high = low + gap;
                bool const paired = low >= gap % run && ((low - gap % run) / gap) % 2 == 0;
                if (high < COUNT && paired && low / (2 * run) == high / (2 * run))
                {
                    uint32_t const smaller = minOf(keys[low], keys[high]);
                    keys[high] = maxOf(keys[low], keys[high]);
                    keys[low] = smaller;
                }
            }
        }
    }
}

//! The n-th largest of COUNT keys (COUNT a power of two). Half-kept groups sort two halves and merge once.
template <int COUNT>
NM_HOST_DEVICE uint32_t nthLargest(uint32_t const (&keys)[COUNT], int n)
{
    constexpr int kHALF = COUNT / 2;
    if (2 * n == COUNT)
    {
        uint32_t left[kHALF];
        uint32_t right[kHALF];
#pragma unroll
        for (int i = 0; i < kHALF; ++i)
        {
            left[i] = keys[i];
            right[i] = keys[kHALF + i];
        }
        sortAscending<kHALF>(left);
        sortAscending<kHALF>(right);
        uint32_t smallestKept = 0xffffffffU;
#pragma unroll
        for (int i = 0; i < kHALF; ++i)
        {
            smallestKept = minOf(smallestKept, maxOf(left[i], right[kHALF - 1 - i]));
        }
        return smallestKept;
    }
    uint32_t sorted[COUNT];
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
    {
        sorted[i] = keys[i];
    }
    sortAscending<COUNT>(sorted);
    uint32_t chosen = 0U;
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
    {
        chosen = i == COUNT - n ? sorted[i] : chosen;
    }
    return chosen;
}

//! Bit i set where element i of a group of COUNT <= 32 keys is among the n kept.
template <int COUNT>
NM_HOST_DEVICE uint32_t keepMask(uint32_t const (&keys)[COUNT], int n)
{
    uint32_t const threshold = nthLargest<COUNT>(keys, n);
    int ties = n;
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
    {
        ties -= keys[i] > threshold ? 1 : 0;
    }
    uint32_t mask = 0U;
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
    {
        bool const tied = keys[i] == threshold && ties > 0;
        ties -= tied ? 1 : 0;
        mask |= (keys[i] > threshold || tied) ? 1U << i : 0U;
    }
    return mask;
}

//! How many of a group's m keys precede element `index`; it is kept where this is below n. Any m.
NM_HOST_DEVICE int rankInGroup(uint32_t const* keys, int m, int index)
{
    uint32_t const key = keys[index];
    int rank = 0;
    for (int i = 0; i < m; ++i)
    {
        rank += precedes(keys[i], key, i < index) ? 1 : 0;
    }
    return rank;
}

//! rankInGroup for m = 4, 8, 16, 32 in the order in which a lane meets aligned quads of keys: quad `own ^ step`, all
//! of whose elements lie on one side of the lane's own quad, so one threshold serves four comparisons.
//! `loadQuad(quad, out[4])` reads four consecutive keys of the group.
template <int COUNT, typename LoadQuad>
NM_HOST_DEVICE int rankByQuads(uint32_t key, int index, LoadQuad const& loadQuad)
{
    int const ownQuad = index / 4;
    int const ownSlot = index % 4;
    int rank = 0;
    uint32_t quad[4];
    loadQuad(ownQuad, quad);
#pragma unroll
    for (int slot = 0; slot < 4; ++slot)
    {
        rank += precedes(quad[slot], key, slot < ownSlot) ? 1 : 0;
    }
#pragma unroll
    for (int step = 1; step < COUNT / 4; ++step)
    {
        int const other = ownQuad ^ step;
        uint32_t const bar = key - (other < ownQuad ? 1U : 0U);
        loadQuad(other, quad);
#pragma unroll
        for (int slot = 0; slot < 4; ++slot)
        {
            rank += quad[slot] > bar ? 1 : 0;
        }
    }
    return rank;
}

} // namespace nmexport::cuda
