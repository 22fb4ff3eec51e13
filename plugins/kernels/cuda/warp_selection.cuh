// A warp ranks its own slice of channels and queues the kept ones, without waiting for any other
// warp. This file: any m; pair_selection.cuh: groups of 16.
#pragma once

#include "decode_memory.h"
#include "device_primitives.cuh"
#include "nm_cuda.h"
#include "selection.cuh"
#include "warp.cuh"
#include "work_split.h"

namespace nmexport::cuda {

//! A queued row of W, by its position, and what each token multiplies it with; one shared-memory
//! access up to three tokens.
template <int TOKENS>
struct alignas(TOKENS == 1 ? 8 : 16) Kept {
    int32_t row;
    float value[TOKENS];
};

//! One warp's shared memory: a window of channels to rank and a ring of kept ones to multiply.
template <int TOKENS, int RING>
struct alignas(16) WarpScratch {
    uint32_t key[TOKENS][kWINDOW];
    float z[TOKENS][kWINDOW];
    Kept<TOKENS> queue[RING];
};

//! Walks one warp's slice of the group order, for any m and every option.
template <typename T, int TOKENS, int RING, bool MOMENTS>
class WarpSelector {
  public:
    using Scratch = WarpScratch<TOKENS, RING>;

    __device__ WarpSelector(Scratch* scratch, Selection const& selection, T const* x,
                            int32_t channels, Range slice, float const* eta)
        : mScratch{scratch},
          mSelection{selection},
          mX{x},
          mChannels{channels},
          mNext{slice.begin},
          mEnd{slice.end},
          mWindowBegin{slice.begin},
          mWindowEnd{slice.begin},
          mEta{eta} {}

    //! Loads of constants (see Selection); call before waiting for the kernel that makes the
    //! activations.
    __device__ void prepare() {}

    //! First loads of activations; call right after that wait.
    __device__ void begin() {}

    //! Queues kept channels until at least `wanted` are there or the slice is at its end.
    __device__ void fill(uint32_t wanted) {
        int32_t const width = chunkWidth(mSelection.m);
        while (tail - head < wanted && mNext < mEnd) {
            if (mNext == mWindowEnd) {
                stage(width);
            }
            int32_t const count = min(width, mWindowEnd - mNext);
            append(count);
            mNext += count;
        }
        __syncwarp();
    }

    uint32_t head{0};  //!< first queued entry, counted from the start of the slice
    uint32_t tail{0};  //!< one past the last
    Moments moments[MOMENTS ? TOKENS : 1];

  private:
    //! Reads the next window: z and its rank key, in group order.
    __device__ void stage(int32_t width) {
        constexpr int kSTEPS = kWINDOW / kWARP;
        int const lane = threadIdx.x % kWARP;
        mWindowBegin = mNext;
        mWindowEnd = min(mEnd, mNext + kWINDOW / width * width);
        int32_t const count = mWindowEnd - mWindowBegin;
        float z[TOKENS][kSTEPS];
#pragma unroll
        for (int step = 0; step < kSTEPS; ++step) {
            int32_t const position = mWindowBegin + min(step * kWARP + lane, count - 1);
            int32_t const channel = mSelection.channelOrder == nullptr
                                        ? position
                                        : __ldg(mSelection.channelOrder + position);
#pragma unroll
            for (int token = 0; token < TOKENS; ++token) {
                z[token][step] =
                    loadActivation(mX + static_cast<int64_t>(token) * mChannels + channel);
            }
            if ((step + 1) * kWARP >= count) {
                break;
            }
        }
        __syncwarp();  // the window's last readers are done
#pragma unroll
        for (int step = 0; step < kSTEPS; ++step) {
            int32_t const slot = step * kWARP + lane;
            if (slot < count) {
                int32_t const position = mWindowBegin + slot;
#pragma unroll
                for (int token = 0; token < TOKENS; ++token) {
                    float const shifted = z[token][step] - shiftOf(token, position);
                    mScratch->z[token][slot] = shifted;
                    mScratch->key[token][slot] = keyOf(shifted, position);
                }
            }
        }
        __syncwarp();
    }

    __device__ float shiftOf(int token, int32_t position) const {
        if (mSelection.dynamicShift) {
            return mEta[token];
        }
        if (mSelection.shiftLength == 0) {
            return 0.0F;
        }
        return __ldg(mSelection.shift + (mSelection.shiftLength == 1 ? 0 : position));
    }

    __device__ uint32_t keyOf(float z, int32_t position) const {
        if (mSelection.scoreScale == nullptr) {
            return magnitudeKey(z);
        }
        return orderedKey(scaledScore(z, __ldg(mSelection.scoreScale + position)));
    }

    //! Ranks the next `count` elements of the window and queues those that any token keeps.
    __device__ void append(int32_t count) {
        constexpr int kPER_LANE = kMAX_GROUP / kWARP;
        int const lane = threadIdx.x % kWARP;
#pragma unroll
        for (int part = 0; part < kPER_LANE; ++part) {
            int32_t const element = part * kWARP + lane;
            int32_t const slot = mNext - mWindowBegin + element;
            bool const isActive = element < count;
            bool isKept[TOKENS];
            bool isKeptByAny = false;
#pragma unroll
            for (int token = 0; token < TOKENS; ++token) {
                isKept[token] = isActive && keeps(token, slot, element);
                isKeptByAny = isKeptByAny || isKept[token];
                if constexpr (MOMENTS) {
                    if (isActive) {
                        moments[token].add(mScratch->z[token][slot], isKept[token]);
                    }
                }
            }
            uint32_t const kept = __ballot_sync(kWHOLE_WARP, isKeptByAny);
            if (isKeptByAny) {
                Kept<TOKENS> entry;
                entry.row = mNext + element;
                float const scale = mSelection.valueScale == nullptr
                                        ? 1.0F
                                        : __ldg(mSelection.valueScale + entry.row);
#pragma unroll
                for (int token = 0; token < TOKENS; ++token) {
                    entry.value[token] = isKept[token] ? scale * mScratch->z[token][slot] : 0.0F;
                }
                mScratch->queue[(tail + __popc(kept & ((1U << lane) - 1U))) % RING] = entry;
            }
            tail += __popc(kept);
        }
    }

    __device__ bool keeps(int token, int32_t slot, int32_t element) const {
        if (mSelection.n == mSelection.m) {
            return true;
        }
        int32_t const index = element % mSelection.m;
        return rankInGroup(mScratch->key[token] + slot - index, mSelection.m, index) < mSelection.n;
    }

    Scratch* mScratch;
    Selection const& mSelection;
    T const* mX;
    int32_t mChannels;
    int32_t mNext;
    int32_t mEnd;
    int32_t mWindowBegin;
    int32_t mWindowEnd;
    float const* mEta;
};

}  // namespace nmexport::cuda
