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
    kNONE,    //!< nothing is dropped
    kPACKED,  //!< two positions a lane, by bare magnitude: the shortest way for one token
    kWIDE,    //!< two positions a lane, every option
    kPAIRS,   //!< two groups a thread, 8 of 16 by bare magnitude: the least work, for many tokens
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

//! Where the 8 neighbouring values number `octet` of a row lie that is read 32 values a thread: no
//! two of 8 neighbouring threads then ask the same banks.
__device__ __forceinline__ int32_t spread(int32_t octet) {
    return octet ^ (octet >> 3 & 3);
}

//! A row's place in shared memory, and where a producer of so many threads puts its values. Where
//! lanes rank, AT_ONCE pairs of a lane are in flight together, and several blocks may share a row:
//! each has all of it, and prunes its own part.
template <typename T, Pruner PRUNER, int THREADS, int AT_ONCE = 4>
class StagedRow {
  public:
    __device__ StagedRow(unsigned char* memory, Selection const& selection, int32_t channels)
        : mSelection{selection}, mChannels{channels}, mStaged{reinterpret_cast<uint4*>(memory)} {}

    //! Reads the first constants (see Selection); call before waiting for the kernel ahead.
    __device__ void prepare() {
        if constexpr (kBY_LANES) {
            readConstants(static_cast<int32_t>(blockIdx.y) * kSTRIDE);
        }
    }

    //! Puts 8 neighbouring values, beginning with channel 8 * octet.
    __device__ void put(int32_t octet, uint4 values) const {
        bool const isGathered = mSelection.channelOrder != nullptr;
        mStaged[PRUNER == Pruner::kPAIRS && !isGathered ? spread(octet) : octet] = values;
    }

    //! Prunes what the block has put, and writes s [K] (and, where wanted and with kPAIRS, keep
    //! [K]); a barrier stands between the two here.
    __device__ void prune(T* s, uint8_t* keep = nullptr) {
        __syncthreads();
        if constexpr (kBY_LANES) {
            pruneLanes(s);
        } else {
            prunePairs(s, keep);
        }
    }

  private:
    static constexpr bool kBY_LANES = PRUNER == Pruner::kPACKED || PRUNER == Pruner::kWIDE;
    static constexpr bool kIS_BARE = PRUNER != Pruner::kWIDE;
    static constexpr int kLOOKED_UP_AT_ONCE = 8;
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

    __device__ void pruneLanes(T* s) {
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
                    prunePair<T, kIS_BARE>(mSelection, mConstants[step], words[step]);
                int32_t const position = positionOf(first, step);
                if (position < mChannels) {
                    reinterpret_cast<uint32_t*>(s)[position / 2] = word;
                }
            }
        }
    }

    //! Brings the row from channels to positions, spread, through registers: a second row in shared
    //! memory would leave no first-level cache for the order.
    __device__ void gather() const {
        constexpr int kMOST = kMAX_PRUNED_CHANNELS / 2 / THREADS;
        auto* const row = reinterpret_cast<uint32_t*>(mStaged);
        auto const* const order = reinterpret_cast<int2 const*>(mSelection.channelOrder);
        int32_t const count = mChannels / 2;
        uint32_t words[kMOST];
        // Every load is unconditional, so that many are in flight together.
#pragma unroll
        for (int first = 0; first < kMOST; first += kLOOKED_UP_AT_ONCE) {
            int2 channels[kLOOKED_UP_AT_ONCE];
#pragma unroll
            for (int i = 0; i < kLOOKED_UP_AT_ONCE; ++i) {
                int32_t const word = static_cast<int32_t>(threadIdx.x) + (first + i) * THREADS;
                channels[i] = __ldg(order + min(word, count - 1));
            }
#pragma unroll
            for (int i = 0; i < kLOOKED_UP_AT_ONCE; ++i) {
                words[first + i] = wordOf(channels[i]);
            }
            if ((first + kLOOKED_UP_AT_ONCE) * THREADS >= count) {
                break;
            }
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < kMOST; ++i) {
            int32_t const word = static_cast<int32_t>(threadIdx.x) + i * THREADS;
            if (word < count) {
                row[4 * spread(word / 4) + word % 4] = words[i];
            }
        }
        __syncthreads();
    }

    __device__ void prunePairs(T* s, uint8_t* keep) const {
        if (mSelection.channelOrder != nullptr) {
            gather();
        }
        for (int32_t pair = static_cast<int32_t>(threadIdx.x); pair < mChannels / 32;
             pair += THREADS) {
            uint4 const a[2] = {mStaged[spread(4 * pair)], mStaged[spread(4 * pair + 1)]};
            uint4 const b[2] = {mStaged[spread(4 * pair + 2)], mStaged[spread(4 * pair + 3)]};
            uint32_t const mask = keepOfPair<T>(a, b);
            mStaged[spread(4 * pair)] = keepElements(a[0], mask);
            mStaged[spread(4 * pair + 1)] = keepElements(a[1], mask >> 8);
            mStaged[spread(4 * pair + 2)] = keepElements(b[0], mask >> 16);
            mStaged[spread(4 * pair + 3)] = keepElements(b[1], mask >> 24);
            if (keep != nullptr) {
                storeMask(keep + 32 * pair, mask);
            }
        }
        // A thread's 64 bytes lie apart from its neighbour's: stored from here they go in whole
        // lines.
        __syncthreads();
        for (int32_t octet = static_cast<int32_t>(threadIdx.x); octet < mChannels / 8;
             octet += THREADS) {
            reinterpret_cast<uint4*>(s)[octet] = mStaged[spread(octet)];
        }
    }

    Selection const& mSelection;
    int32_t mChannels;
    uint4* mStaged;  //!< [K / 8], by channel; of kPAIRS in the end by position, and spread
    PairConstants mConstants[kBY_LANES ? AT_ONCE : 1];
};

//! Shared memory of a row that is pruned so.
inline size_t stagedBytes(Pruner pruner, int32_t channels) {
    return pruner == Pruner::kNONE ? 0 : 2 * static_cast<size_t>(channels);
}

}  // namespace nmexport::cuda
