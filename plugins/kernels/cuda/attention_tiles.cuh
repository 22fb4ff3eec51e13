// Attention of one token: 16 old positions as a warp holds them, their scores and the softmax so
// far.
#pragma once

#include "attention_turn.cuh"

namespace nmexport::cuda::attention {

//! The old rows of one head of keys that the new token sees.
template <typename T, int HEAD>
struct OldRows {
    T* keys;        //!< position g, chunk t
    T* values;      //!< position 2t, chunk g
    int32_t end;    //!< the new token's position
    int32_t older;  //!< positions before it that it sees, if there are as many

    __device__ bool has(int32_t position) const {
        return static_cast<uint32_t>(end - 1 - position) < static_cast<uint32_t>(older);
    }
};

//! 16 positions as a lane holds them.
template <typename T, int HEAD>
struct Tile {
    uint4 keys[2][HEAD / 32];    //!< positions g and 8 + g, chunks t, t + 4, ...
    uint4 values[HEAD / 64][4];  //!< chunks g, g + 8; positions 2t, 2t + 1, 8 + 2t, 9 + 2t

    __device__ void loadKeys(OldRows<T, HEAD> const& rows, int32_t position, int g) {
        T const* const from = rows.keys + static_cast<int64_t>(position) * HEAD;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            bool const isThere = rows.has(position + 8 * half + g);
#pragma unroll
            for (int i = 0; i < HEAD / 32; ++i) {
                keys[half][i] = loadConstantWhere(isThere, from + 8 * half * HEAD + 4 * i * kCHUNK);
            }
        }
    }

    __device__ void loadValues(OldRows<T, HEAD> const& rows, int32_t position, int t) {
        T const* const from = rows.values + static_cast<int64_t>(position) * HEAD;
#pragma unroll
        for (int p = 0; p < 4; ++p) {
            int const ahead = 8 * (p / 2) + p % 2;
            bool const isThere = rows.has(position + ahead + 2 * t);
#pragma unroll
            for (int m = 0; m < HEAD / 64; ++m) {
                values[m][p] = loadConstantWhere(isThere, from + ahead * HEAD + 8 * m * kCHUNK);
            }
        }
    }
};

//! Asks for a tile's values of 128 elements, 128 bytes a lane.
template <typename T, int HEAD>
__device__ __forceinline__ void prefetchValues(OldRows<T, HEAD> const& rows, int32_t position,
                                               int lane) {
    static_assert(HEAD * sizeof(T) <= 256);
    int32_t const row = position + lane / 2;
    if (rows.has(row)) {
        int const offset = 2 * (lane % 4) * HEAD + lane / 4 * kCHUNK;  // of rows.values
        prefetchToL2(rows.values - offset + static_cast<int64_t>(row) * HEAD +
                     lane % 2 * (HEAD / 2));
    }
}

//! Softmax so far: of the positions that a warp has seen.
template <typename T, int HEAD>
struct Softmax {
    float highest;  //!< score of head g
    float total;    //!< sum of head g's weights over this lane's positions
    //! Sums of weighted values: [m][j] is elements 2j (first two) and 2j + 1 of chunk g + 8m, for
    //! heads 2t and 2t + 1.
    float sums[HEAD / 64][4][4];

    __device__ void clear() {
        highest = lowest();
        total = 0.0F;
#pragma unroll
        for (int m = 0; m < HEAD / 64; ++m) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    sums[m][j][i] = 0.0F;
                }
            }
        }
    }

    //! The new token alone: a weight of one for its values [chunks g, g + 8].
    __device__ void begin(float score, uint4 const (&values)[HEAD / 64], int t) {
        highest = score;
        total = t == 0 ? 1.0F : 0.0F;
#pragma unroll
        for (int m = 0; m < HEAD / 64; ++m) {
            Unpacked<T> const value = unpack(values[m], static_cast<T const*>(nullptr));
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                sums[m][j][0] = sums[m][j][1] = value.value[2 * j];
                sums[m][j][2] = sums[m][j][3] = value.value[2 * j + 1];
            }
        }
    }

    //! Makes weights of a tile's scores: positions 2t, 2t + 1, 8 + 2t, 9 + 2t of head g, in units
    //! of log2.
    __device__ void weigh(float (&scores)[4], int t) {
        float top = fmaxf(fmaxf(scores[0], scores[1]), fmaxf(scores[2], scores[3]));
        top = fmaxf(top, __shfl_xor_sync(kALL_LANES, top, 1));
        top = fmaxf(top, __shfl_xor_sync(kALL_LANES, top, 2));
        float const raised = fmaxf(highest, top);
        float const base = raised == lowest() ? 0.0F : raised;
        if (__any_sync(kALL_LANES, raised != highest)) {
            float const factor = exp2Approx(highest - base);
            float const even = __shfl_sync(kALL_LANES, factor, 8 * t);
            float const odd = __shfl_sync(kALL_LANES, factor, 8 * t + 4);
            total *= factor;
#pragma unroll
            for (int m = 0; m < HEAD / 64; ++m) {
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    sums[m][j][0] *= even;
                    sums[m][j][1] *= odd;
                    sums[m][j][2] *= even;
                    sums[m][j][3] *= odd;
                }
            }
            highest = raised;
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            scores[i] = exp2Approx(scores[i] - base);
            total += scores[i];
        }
    }

    //! Adds a tile's values, weighted.
    __device__ void add(Tile<T, HEAD> const& tile, float const (&weights)[4]) {
        T const* const type = nullptr;
        uint32_t const b0 = packed(weights[0], weights[1], type);
        uint32_t const b1 = packed(weights[2], weights[3], type);
#pragma unroll
        for (int m = 0; m < HEAD / 64; ++m) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                uint32_t rows[4];
#pragma unroll
                for (int p = 0; p < 4; ++p) {
                    rows[p] = word(tile.values[m][p], j);
                }
                multiplyTiles<T>(sums[m][j], __byte_perm(rows[0], rows[1], 0x5410),
                                 __byte_perm(rows[0], rows[1], 0x7632),
                                 __byte_perm(rows[2], rows[3], 0x5410),
                                 __byte_perm(rows[2], rows[3], 0x7632), b0, b1);
            }
        }
    }
};

//! A lane's own chunks t, t + 4, ... of query head g, in shared memory: registers are for tiles.
template <int HEAD>
struct LaneQuery {
    uint32_t own;     //!< address of chunk t
    uint32_t stride;  //!< bytes to the lane's next chunk
    bool isThere;     //!< zeros where there is no head g

    __device__ void store(uint4 const (&query)[HEAD / 32]) const {
        if (isThere) {
#pragma unroll
            for (int i = 0; i < HEAD / 32; ++i) {
                storeShared(own + i * stride, query[i]);
            }
        }
    }

    __device__ uint4 chunk(int i) const {
        return isThere ? loadShared(own + i * stride) : uint4{0, 0, 0, 0};
    }
};

//! Scores of head g for a tile's positions 2t, 2t + 1, 8 + 2t, 9 + 2t.
template <typename T, int HEAD>
__device__ __forceinline__ void scoreTile(float (&scores)[4], LaneQuery<HEAD> const& query,
                                          Tile<T, HEAD> const& tile) {
    float products[2][4] = {};  // heads 8 .. 15, the last two of each, are none
#pragma unroll
    for (int i = 0; i < HEAD / 32; ++i) {
        uint4 const chunk = query.chunk(i);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            uint4 const key = tile.keys[half][i];
            multiplyTiles<T>(products[half], chunk.x, 0, chunk.y, 0, key.x, key.y);
            multiplyTiles<T>(products[half], chunk.z, 0, chunk.w, 0, key.z, key.w);
        }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        scores[i] = products[i / 2][i % 2];
    }
}

//! The new token's score of head g.
template <typename T, int HEAD>
__device__ __forceinline__ float scoreNewKey(LaneQuery<HEAD> const& query,
                                             uint4 const (&key)[HEAD / 32]) {
    T const* const type = nullptr;
    float sum = 0.0F;
#pragma unroll
    for (int i = 0; i < HEAD / 32; ++i) {
        Unpacked<T> const q = unpack(query.chunk(i), type);
        Unpacked<T> const k = unpack(key[i], type);
#pragma unroll
        for (int e = 0; e < kCHUNK; ++e) {
            sum += q.value[e] * k.value[e];
        }
    }
    sum += __shfl_xor_sync(kALL_LANES, sum, 1);
    return sum + __shfl_xor_sync(kALL_LANES, sum, 2);
}

}  // namespace nmexport::cuda::attention
