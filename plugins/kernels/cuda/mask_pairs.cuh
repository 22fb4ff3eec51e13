// Two groups of 16 a thread, ranked at once in the halves of 32-bit words: 8 of 16 by bare
// magnitude.
#pragma once

#include "element.cuh"
#include "selection.cuh"

namespace nmexport::cuda {

//! Word i of a pair of groups: element i of A in the low half, of B in the high one.
__device__ __forceinline__ void interleave(uint32_t (&out)[16], uint4 const (&a)[2],
                                           uint4 const (&b)[2]) {
    uint32_t const wordsA[8] = {a[0].x, a[0].y, a[0].z, a[0].w, a[1].x, a[1].y, a[1].z, a[1].w};
    uint32_t const wordsB[8] = {b[0].x, b[0].y, b[0].z, b[0].w, b[1].x, b[1].y, b[1].z, b[1].w};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        out[2 * i] = __byte_perm(wordsA[i], wordsB[i], 0x5410);
        out[2 * i + 1] = __byte_perm(wordsA[i], wordsB[i], 0x7632);
    }
}

//! Zeroes the elements of one word whose bit is not set; `mask` bit 0 is for the low half, bit 1
//! for the high one.
__device__ __forceinline__ uint32_t keepHalves(uint32_t word, uint32_t mask) {
    uint32_t const low = 0U - (mask & 1U);
    uint32_t const high = 0U - (mask >> 1 & 1U);
    return word & __byte_perm(low, high, 0x5410);
}

__device__ __forceinline__ uint4 keepElements(uint4 words, uint32_t mask) {
    return make_uint4(keepHalves(words.x, mask), keepHalves(words.y, mask >> 2),
                      keepHalves(words.z, mask >> 4), keepHalves(words.w, mask >> 6));
}

__device__ __forceinline__ void storeMask(uint8_t* keep, uint32_t mask) {
    for (int i = 0; i < 32; ++i) {
        keep[i] = static_cast<uint8_t>(mask >> i & 1U);
    }
}

//! Two groups with what is dropped zeroed, as one run of 32 elements; bit i of `mask` is element i.
__device__ __forceinline__ void storePair(uint4* s, uint4 const (&a)[2], uint4 const (&b)[2],
                                          uint32_t mask, uint8_t* keep) {
    s[0] = keepElements(a[0], mask);
    s[1] = keepElements(a[1], mask >> 8);
    s[2] = keepElements(b[0], mask >> 16);
    s[3] = keepElements(b[1], mask >> 24);
    if (keep != nullptr) {
        storeMask(keep, mask);
    }
}

//! What 8 of 16 of each of two groups keep by bare magnitude, two keys per word.
template <typename T>
__device__ __forceinline__ uint32_t keepOfPair(uint4 const (&a)[2], uint4 const (&b)[2]) {
    uint32_t keys[16];
    interleave(keys, a, b);
#pragma unroll
    for (uint32_t& key : keys) {
        key = packedKeys(key, kNAN_KEY<T>);
    }
    return keepHalfOfPair(keys);
}

}  // namespace nmexport::cuda
