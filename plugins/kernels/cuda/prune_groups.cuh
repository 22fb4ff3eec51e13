// Rows pruned a group a thread, for many tokens: what ranks a group stays in registers while the
// thread goes from row to row, so constants are read once for some tokens. 16-bit types in groups
// of 16 alone.
#pragma once

#include "device_primitives.cuh"
#include "mask_pairs.cuh"
#include "warp_selection.cuh"

namespace nmexport::cuda {

inline constexpr int kGROUP = 16;

//! A group's 16 values.
struct Group {
    uint4 half[2];
};

__device__ __forceinline__ uint4 fromNeighbour(uint4 value) {
    return make_uint4(
        __shfl_xor_sync(kWHOLE_WARP, value.x, 1), __shfl_xor_sync(kWHOLE_WARP, value.y, 1),
        __shfl_xor_sync(kWHOLE_WARP, value.z, 1), __shfl_xor_sync(kWHOLE_WARP, value.w, 1));
}

//! From a group a lane to halves of two groups a lane, and back. Loads and stores of halves fill
//! whole sectors of memory:
//!
//!   lane            2i                          2i + 1
//!   whole groups    g: first, second            g + 1: first, second
//!   halves          first of g, first of g + 1  second of g, second of g + 1
__device__ __forceinline__ Group exchanged(Group const& group) {
    bool const isOdd = threadIdx.x % 2 == 1;
    uint4 const got = fromNeighbour(isOdd ? group.half[0] : group.half[1]);
    return isOdd ? Group{{got, group.half[1]}} : Group{{group.half[0], got}};
}

//! The first of the two runs of 8 values that are a lane's halves, in a warp's 32 groups; the other
//! lies two runs behind it.
__device__ __forceinline__ int32_t octetOfLane(int32_t firstGroup) {
    int32_t const lane = static_cast<int32_t>(threadIdx.x) % kWARP;
    return 2 * firstGroup + lane / 2 * 4 + lane % 2;
}

//! Stores a group a lane; the whole warp must call.
template <typename T>
__device__ __forceinline__ void storeGroups(T* row, Group const& group, int32_t firstGroup,
                                            int32_t channels) {
    Group const halves = exchanged(group);
    int32_t const octet = octetOfLane(firstGroup);
#pragma unroll
    for (int part = 0; part < 2; ++part) {
        if (octet + 2 * part < channels / 8) {
            reinterpret_cast<uint4*>(row)[octet + 2 * part] = halves.half[part];
        }
    }
}

// Pruners of one group in one or two rows: a lane makes one for its group and reuses it row after
// row.

//! Nothing is dropped.
template <typename T>
class WholeGroup {
  public:
    static constexpr int ROWS = 1;

    __device__ WholeGroup(Selection const&, int32_t) {}

    __device__ void prune(Group (&)[ROWS]) const {}
};

//! 8 of 16 by bare magnitude: two rows at once, in the halves of words.
template <typename T>
class HalfBareGroup {
  public:
    static constexpr int ROWS = 2;

    __device__ HalfBareGroup(Selection const&, int32_t) {}

    __device__ void prune(Group (&rows)[ROWS]) const {
        uint32_t const mask = keepOfPair<T>(rows[0].half, rows[1].half);
#pragma unroll
        for (int row = 0; row < ROWS; ++row) {
#pragma unroll
            for (int part = 0; part < 2; ++part) {
                rows[row].half[part] =
                    keepElements(rows[row].half[part], mask >> (16 * row + 8 * part));
            }
        }
    }
};

//! Every n and option. Scores are seldom equal: what is at the threshold or above it is what is
//! kept, unless a warp has a group where that is more than n.
template <typename T>
class RankedGroup {
  public:
    static constexpr int ROWS = 1;

    __device__ RankedGroup(Selection const& selection, int32_t group)
        : mSelection{selection}, mFirst{group * kGROUP} {
        read(mShift, selection.shiftLength == 1 ? nullptr : selection.shift,
             selection.shiftLength == 1 ? __ldg(selection.shift) : 0.0F);
        read(mScale, selection.scoreScale, 1.0F);
#pragma unroll
        for (int i = 0; i < kGROUP; ++i) {
            mHasPlainScores = mHasPlainScores && mScale[i] >= 0.0F;
        }
    }

    __device__ void prune(Group (&rows)[ROWS]) const {
        uint32_t keys[kGROUP];
        uint32_t words[kGROUP / 2];
        memcpy(words, &rows[0], sizeof(words));
#pragma unroll
        for (int i = 0; i < kGROUP; ++i) {
            // One float32 product, as everywhere; no score is below zero where no scale is.
            float const score = scaledScore(valueOf(words, i), mScale[i]);
            keys[i] = mHasPlainScores ? magnitudeKey(score) : orderedKey(score);
        }
        uint32_t const threshold = nthLargest<kGROUP>(keys, mSelection.n);
        int count = 0;
#pragma unroll
        for (int i = 0; i < kGROUP; ++i) {
            count += keys[i] >= threshold ? 1 : 0;
        }
        if (__any_sync(kWHOLE_WARP, count != mSelection.n)) {
            dropLateTies(keys, threshold);
        }
#pragma unroll
        for (int i = 0; i < kGROUP; i += 2) {
            words[i / 2] = packWord(keptValue(words, i, keys[i] >= threshold),
                                    keptValue(words, i + 1, keys[i + 1] >= threshold));
        }
        memcpy(&rows[0], words, sizeof(words));
    }

  private:
    __device__ float valueOf(uint32_t const (&words)[kGROUP / 2], int i) const {
        uint32_t const word = words[i / 2];
        return toFloat<T>(wordHalf<T>(i % 2 == 0 ? word & 0xffffU : word >> 16)) - mShift[i];
    }

    //! Of those at the threshold the first are kept; a key is never 0.
    __device__ void dropLateTies(uint32_t (&keys)[kGROUP], uint32_t threshold) const {
        int spare = mSelection.n;
#pragma unroll
        for (int i = 0; i < kGROUP; ++i) {
            spare -= keys[i] > threshold ? 1 : 0;
        }
#pragma unroll
        for (int i = 0; i < kGROUP; ++i) {
            bool const isTied = keys[i] == threshold;
            keys[i] = isTied && spare <= 0 ? 0U : keys[i];
            spare -= isTied ? 1 : 0;
        }
    }

    __device__ T keptValue(uint32_t const (&words)[kGROUP / 2], int i, bool isKept) const {
        float const scale =
            mSelection.valueScale == nullptr ? 1.0F : __ldg(mSelection.valueScale + mFirst + i);
        return fromFloat<T>(isKept ? valueOf(words, i) * scale : 0.0F);
    }

    __device__ void read(float (&to)[kGROUP], float const* from, float otherwise) const {
#pragma unroll
        for (int i = 0; i < kGROUP; i += 4) {
            float4 const four = from == nullptr
                                    ? make_float4(otherwise, otherwise, otherwise, otherwise)
                                    : __ldg(reinterpret_cast<float4 const*>(from + mFirst + i));
            to[i] = four.x;
            to[i + 1] = four.y;
            to[i + 2] = four.z;
            to[i + 3] = four.w;
        }
    }

    Selection const& mSelection;
    int32_t mFirst;
    bool mHasPlainScores{true};
    float mShift[kGROUP];
    float mScale[kGROUP];
};

//! The channels of a group's positions, below 65536: two a word.
struct GroupOrder {
    uint32_t channels[kGROUP / 2];

    __device__ GroupOrder(int32_t const* order, int32_t group) {
#pragma unroll
        for (int i = 0; i < kGROUP / 4; ++i) {
            int32_t const position = group * kGROUP + 4 * i;
            int4 const four = order == nullptr
                                  ? make_int4(position, position + 1, position + 2, position + 3)
                                  : __ldg(reinterpret_cast<int4 const*>(order + position));
            channels[2 * i] = static_cast<uint32_t>(four.x | four.y << 16);
            channels[2 * i + 1] = static_cast<uint32_t>(four.z | four.w << 16);
        }
    }

    //! The group of a row of 16-bit values that lies in shared memory, by channel.
    __device__ Group of(uint16_t const* row) const {
        uint32_t words[kGROUP / 2];
#pragma unroll
        for (int i = 0; i < kGROUP / 2; ++i) {
            words[i] = row[channels[i] & 0xffffU] | static_cast<uint32_t>(row[channels[i] >> 16])
                                                        << 16;
        }
        return {{make_uint4(words[0], words[1], words[2], words[3]),
                 make_uint4(words[4], words[5], words[6], words[7])}};
    }
};

//! Prunes some rows that lie in shared memory by channel, one behind the other: s [rows, K], by
//! position.
template <typename T, typename PRUNER>
__device__ void pruneStaged(uint4 const* staged, int rows, Selection const& selection,
                            int32_t channels, T* s) {
    int32_t const groups = channels / kGROUP;
    int32_t const lane = static_cast<int32_t>(threadIdx.x) % kWARP;
    auto const* const values = reinterpret_cast<uint16_t const*>(staged);
    for (int32_t first = static_cast<int32_t>(threadIdx.x) - lane; first < groups;
         first += static_cast<int32_t>(blockDim.x)) {
        int32_t const group = min(first + lane, groups - 1);
        GroupOrder const order(selection.channelOrder, group);
        PRUNER const pruner(selection, group);
        for (int row = 0; row < rows; row += PRUNER::ROWS) {
            Group some[PRUNER::ROWS];
#pragma unroll
            for (int i = 0; i < PRUNER::ROWS; ++i) {
                some[i] =
                    order.of(values + static_cast<int64_t>(min(row + i, rows - 1)) * channels);
            }
            pruner.prune(some);
#pragma unroll
            for (int i = 0; i < PRUNER::ROWS; ++i) {
                // The last row may be there twice: the same values go to the same place.
                storeGroups(s + static_cast<int64_t>(min(row + i, rows - 1)) * channels, some[i],
                            first, channels);
            }
        }
    }
}

//! Whether constants can be read four at a time.
inline bool hasAlignedConstants(Selection const& selection) {
    auto const bits =
        reinterpret_cast<uintptr_t>(selection.channelOrder) |
        reinterpret_cast<uintptr_t>(selection.scoreScale) |
        reinterpret_cast<uintptr_t>(selection.valueScale) |
        (selection.shiftLength == 1 ? 0 : reinterpret_cast<uintptr_t>(selection.shift));
    return bits % 16 == 0;
}

}  // namespace nmexport::cuda
