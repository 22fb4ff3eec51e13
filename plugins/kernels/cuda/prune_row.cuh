// A token's row pruned by the block that makes it, in place of a pass of its own: what norms and
// gated activations end with where the next linear is sparse.
//
//   row in shared memory, by channel -> gathered by position -> ranked -> s [K], by position
//
// 16-bit types in groups of 16 alone.
#pragma once

#include "between.h"
#include "mask_pairs.cuh"
#include "warp_selection.cuh"

namespace nmexport::cuda {

//! How a block prunes its rows.
enum class Pruner {
    kNONE,    //!< rows are left as they are
    kGATHER,  //!< gathered by the order alone, nothing is dropped
    kPACKED,  //!< two positions a lane, by bare magnitude: the shortest way for one token
    kWIDE,    //!< two positions a lane, every option
};

//! The constants of a lane's two neighbouring positions.
struct PairConstants {
    int2 channel;
    float shift[2];
    float scoreScale[2];
    float valueScale[2];

    template <bool IS_BARE>
    __device__ static PairConstants read(Selection const& selection, int32_t position) {
        PairConstants pair;
        pair.channel =
            selection.channelOrder == nullptr
                ? make_int2(position, position + 1)
                : __ldg(reinterpret_cast<int2 const*>(selection.channelOrder + position));
        if constexpr (!IS_BARE) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                bool const isScalar = selection.shiftLength == 1;
                pair.shift[i] = selection.shiftLength == 0
                                    ? 0.0F
                                    : __ldg(selection.shift + (isScalar ? 0 : position + i));
                pair.scoreScale[i] = constantAt(selection.scoreScale, position + i);
                pair.valueScale[i] = constantAt(selection.valueScale, position + i);
            }
        }
        return pair;
    }

  private:
    __device__ static float constantAt(float const* values, int32_t position) {
        return values == nullptr ? 1.0F : __ldg(values + position);
    }
};

//! What a lane's two values become; every lane of the warp must call. A group is 8 neighbouring
//! lanes, all of them with values or none.
template <typename T, bool IS_BARE>
__device__ __forceinline__ uint32_t prunePair(Selection const& selection,
                                              PairConstants const& constants, uint32_t word) {
    if constexpr (IS_BARE) {
        uint32_t const keys = packedKeys(word, kNAN_KEY<T>);
        PackedRank rank(keys);
#pragma unroll
        for (uint32_t step = 1; step < 8; ++step) {
            rank.meet(__shfl_xor_sync(kWHOLE_WARP, keys, step), otherLaneIsEarlier(step));
        }
        uint32_t const low = rank.keepsLow(selection.n) ? 0xffffU : 0U;
        uint32_t const high = rank.keepsHigh(selection.n) ? 0xffff0000U : 0U;
        return word & (low | high);
    } else {
        float const z[2] = {toFloat<T>(wordHalf<T>(word & 0xffffU)) - constants.shift[0],
                            toFloat<T>(wordHalf<T>(word >> 16)) - constants.shift[1]};
        uint32_t keys[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            keys[i] = selection.scoreScale == nullptr
                          ? magnitudeKey(z[i])
                          : orderedKey(scaledScore(z[i], constants.scoreScale[i]));
        }
        WideRank rank(keys[0], keys[1]);
#pragma unroll
        for (uint32_t step = 1; step < 8; ++step) {
            uint32_t const low = __shfl_xor_sync(kWHOLE_WARP, rank.low, step);
            uint32_t const high = __shfl_xor_sync(kWHOLE_WARP, rank.high, step);
            rank.meet(low, high, otherLaneIsEarlier(step));
        }
        T const low =
            fromFloat<T>(rank.beforeLow < selection.n ? z[0] * constants.valueScale[0] : 0.0F);
        T const high =
            fromFloat<T>(rank.beforeHigh < selection.n ? z[1] * constants.valueScale[1] : 0.0F);
        return packWord(low, high);
    }
}

//! A row in shared memory that lanes rank, AT_ONCE pairs of each in flight together. Several blocks
//! may share a row: each has all of it, and prunes its own part.
template <typename T, Pruner PRUNER, int THREADS, int AT_ONCE = 4>
class StagedRow {
  public:
    __device__ StagedRow(uint4 const* staged, Selection const& selection, int32_t channels)
        : mSelection{selection}, mChannels{channels}, mStaged{staged} {}

    //! Reads the first constants (see Selection); call before waiting for the kernel ahead.
    __device__ void prepare() { readConstants(static_cast<int32_t>(blockIdx.y) * kSTRIDE); }

    //! Prunes the row, once it is there, and writes s [K].
    __device__ void prune(T* s) {
        int32_t const begin = static_cast<int32_t>(blockIdx.y) * kSTRIDE;
        for (int32_t first = begin; first < mChannels;
             first += static_cast<int32_t>(gridDim.y) * kSTRIDE) {
            if (first > begin) {
                readConstants(first);
            }
            uint32_t words[AT_ONCE];
#pragma unroll
            for (int step = 0; step < AT_ONCE; ++step) {
                words[step] = wordOf(mConstants[step].channel);
            }
#pragma unroll
            for (int step = 0; step < AT_ONCE; ++step) {
                uint32_t const word =
                    PRUNER == Pruner::kGATHER
                        ? words[step]
                        : prunePair<T, kIS_BARE>(mSelection, mConstants[step], words[step]);
                int32_t const position = positionOf(first, step);
                if (position < mChannels) {
                    reinterpret_cast<uint32_t*>(s)[position / 2] = word;
                }
            }
        }
    }

  private:
    static constexpr bool kIS_BARE = PRUNER != Pruner::kWIDE;
    static constexpr int32_t kSTRIDE = 2 * AT_ONCE * THREADS;  //!< positions of a block at a time

    __device__ int32_t positionOf(int32_t first, int step) const {
        return first +
               2 * (step * static_cast<int32_t>(blockDim.x) + static_cast<int32_t>(threadIdx.x));
    }

    __device__ void readConstants(int32_t first) {
#pragma unroll
        for (int step = 0; step < AT_ONCE; ++step) {
            int32_t const position = positionOf(first, step);
            mConstants[step] =
                PairConstants::read<kIS_BARE>(mSelection, position < mChannels ? position : 0);
        }
    }

    //! The values of two channels as one word.
    __device__ uint32_t wordOf(int2 channel) const {
        auto const* const values = reinterpret_cast<uint16_t const*>(mStaged);
        return values[channel.x] | static_cast<uint32_t>(values[channel.y]) << 16;
    }

    Selection const& mSelection;
    int32_t mChannels;
    uint4 const* mStaged;  //!< [K / 8], by channel
    PairConstants mConstants[AT_ONCE];
};

//! Shared memory of a row that is pruned so.
inline size_t stagedBytes(Pruner pruner, int32_t channels) {
    return pruner == Pruner::kNONE ? 0 : 2 * static_cast<size_t>(channels);
}

}  // namespace nmexport::cuda
