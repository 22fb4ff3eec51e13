// A warp ranks its own slice of channels and queues the kept ones, without waiting for any other warp.
#pragma once

#include "device_primitives.cuh"
#include "nm_cuda.h"
#include "selection.cuh"
#include "work_split.h"

namespace nmexport::cuda
{

inline constexpr int kWARP = 32;
inline constexpr uint32_t kWHOLE_WARP = 0xffffffffU;

//! Channels that a warp holds ready to rank in shared memory at a time: four loads in flight per lane and token.
inline constexpr int kWINDOW = 128;

//! Sums of which the variance correction is made, in float64: the mean may dwarf the deviation.
struct Moments
{
    double all{0};
    double allSquared{0};
    double kept{0};
    double keptSquared{0};

    __device__ void add(float z, bool isKept)
    {
        double const value = z;
        all += value;
        allSquared += value * value;
        kept += isKept ? value : 0.0;
        keptSquared += isKept ? value * value : 0.0;
    }

    __device__ void addMoments(Moments const& other)
    {
        all += other.all;
        allSquared += other.allSquared;
        kept += other.kept;
        keptSquared += other.keptSquared;
    }

    //! Over the warp, in a fixed order; every lane gets the sum.
    __device__ void reduceOverWarp()
    {
#pragma unroll
        for (int offset = 16; offset > 0; offset /= 2)
        {
            all += __shfl_xor_sync(kWHOLE_WARP, all, offset);
            allSquared += __shfl_xor_sync(kWHOLE_WARP, allSquared, offset);
            kept += __shfl_xor_sync(kWHOLE_WARP, kept, offset);
            keptSquared += __shfl_xor_sync(kWHOLE_WARP, keptSquared, offset);
        }
    }

    //! nu of the op contract.
    __device__ float correction(int32_t channels) const
    {
        double const meanAll = all / channels;
        double const meanKept = kept / channels;
        double const varAll = fmax(allSquared / channels - meanAll * meanAll, 0.0);
        double const varKept = fmax(keptSquared / channels - meanKept * meanKept, 0.0);
        bool const isPoisoned = isnan(allSquared) || isnan(keptSquared);
        return isPoisoned ? __int_as_float(0x7fffffff) : static_cast<float>(sqrt(varAll / fmax(varKept, 1e-12)));
    }
};

//! One warp's shared memory: a window of channels to rank and a ring of kept ones to multiply.
template <int TOKENS, int RING>
struct alignas(16) WarpScratch
{
    uint32_t key[TOKENS][kWINDOW];
    float z[TOKENS][kWINDOW];
    int32_t channel[kWINDOW];
    int32_t queuedChannel[RING];
    float queuedValue[TOKENS][RING];
};

//! Walks one warp's slice of the group order; GROUP is 4, 8, 16, 32, or 0 for a run-time m of any size.
template <typename T, int TOKENS, int GROUP, int RING, bool MOMENTS>
class WarpSelector
{
public:
    using Scratch = WarpScratch<TOKENS, RING>;

    __device__ WarpSelector(
        Scratch* scratch, Selection const& selection, T const* x, int32_t channels, Range slice, float const* eta)
        : mScratch{scratch}
        , mSelection{selection}
        , mX{x}
        , mChannels{channels}
        , mNext{slice.begin}
        , mEnd{slice.end}
        , mWindowBegin{slice.begin}
        , mWindowEnd{slice.begin}
        , mEta{eta}
    {
    }

    //! Queues kept channels until at least `wanted` are there or the slice is at its end.
    __device__ void fill(int32_t wanted)
    {
        int32_t const width = GROUP == 0 ? chunkWidth(mSelection.m) : kWARP;
        while (tail - head < wanted && mNext < mEnd)
        {
            if (mNext == mWindowEnd)
            {
                stage(width);
            }
            int32_t const count = min(width, mWindowEnd - mNext);
            append(count);
            mNext += count;
        }
        __syncwarp();
    }

    int32_t head{0}; //!< first queued entry, counted from the start of the slice
    int32_t tail{0}; //!< one past the last
    Moments moments[MOMENTS ? TOKENS : 1];

private:
    //! Reads the next window: z and its rank key, in group order.
    __device__ void stage(int32_t width)
    {
        constexpr int kSTEPS = kWINDOW / kWARP;
        int const lane = threadIdx.x % kWARP;
        mWindowBegin = mNext;
        mWindowEnd = min(mEnd, mNext + kWINDOW / width * width);
        int32_t const count = mWindowEnd - mWindowBegin;
        int32_t channel[kSTEPS];
        float z[TOKENS][kSTEPS];
#pragma unroll
        for (int step = 0; step < kSTEPS; ++step)
        {
            int32_t const position = mWindowBegin + min(step * kWARP + lane, count - 1);
            channel[step] = mSelection.channelOrder == nullptr ? position : __ldg(mSelection.channelOrder + position);
#pragma unroll
            for (int token = 0; token < TOKENS; ++token)
            {
                z[token][step] = loadActivation(mX + static_cast<int64_t>(token) * mChannels + channel[step]);
            }
            if ((step + 1) * kWARP >= count)
            {
                break;
            }
        }
        __syncwarp(); // the window's last readers are done
#pragma unroll
        for (int step = 0; step < kSTEPS; ++step)
        {
            int32_t const slot = step * kWARP + lane;
            if (slot < count)
            {
                mScratch->channel[slot] = channel[step];
#pragma unroll
                for (int token = 0; token < TOKENS; ++token)
                {
                    float const shifted = z[token][step] - shiftOf(token, channel[step]);
                    mScratch->z[token][slot] = shifted;
                    mScratch->key[token][slot] = keyOf(shifted, channel[step]);
                }
            }
        }
        __syncwarp();
    }

    __device__ float shiftOf(int token, int32_t channel) const
    {
        if (mSelection.dynamicShift)
        {
            return mEta[token];
        }
        if (mSelection.shiftLength == 0)
        {
            return 0.0F;
        }
        return __ldg(mSelection.shift + (mSelection.shiftLength == 1 ? 0 : channel));
    }

    __device__ uint32_t keyOf(float z, int32_t channel) const
    {
        if (mSelection.scoreScale == nullptr)
        {
            return magnitudeKey(z);
        }
        return orderedKey(scaledScore(z, __ldg(mSelection.scoreScale + channel)));
    }

    //! Ranks the next `count` elements of the window and queues those that any token keeps.
    __device__ void append(int32_t count)
    {
        constexpr int kPER_LANE = GROUP == 0 ? 2 : 1;
        int const lane = threadIdx.x % kWARP;
#pragma unroll
        for (int part = 0; part < kPER_LANE; ++part)
        {
            int32_t const element = part * kWARP + lane;
            int32_t const slot = mNext - mWindowBegin + element;
            bool const isActive = element < count;
            bool isKept[TOKENS];
            bool isKeptByAny = false;
#pragma unroll
            for (int token = 0; token < TOKENS; ++token)
            {
                isKept[token] = isActive && keeps(token, slot, element);
                isKeptByAny = isKeptByAny || isKept[token];
                if constexpr (MOMENTS)
                {
                    if (isActive)
                    {
                        moments[token].add(mScratch->z[token][slot], isKept[token]);
                    }
                }
            }
            uint32_t const kept = __ballot_sync(kWHOLE_WARP, isKeptByAny);
            if (isKeptByAny)
            {
                int32_t const place = (tail + __popc(kept & ((1U << lane) - 1U))) % RING;
                mScratch->queuedChannel[place] = mScratch->channel[slot];
#pragma unroll
                for (int token = 0; token < TOKENS; ++token)
                {
                    mScratch->queuedValue[token][place] = isKept[token] ? mScratch->z[token][slot] : 0.0F;
                }
            }
            tail += __popc(kept);
        }
    }

    __device__ bool keeps(int token, int32_t slot, int32_t element) const
    {
        if (mSelection.n == mSelection.m)
        {
            return true;
        }
        uint32_t const* const keys = mScratch->key[token];
        if constexpr (GROUP == 0)
        {
            int32_t const index = element % mSelection.m;
            return rankInGroup(keys + slot - index, mSelection.m, index) < mSelection.n;
        }
        else
        {
            int32_t const index = element % GROUP;
            uint32_t const* const group = keys + (slot - index);
            auto const loadQuad = [group](int quad, uint32_t(&out)[4])
            {
                uint4 const raw = *reinterpret_cast<uint4 const*>(group + 4 * quad);
                out[0] = raw.x;
                out[1] = raw.y;
                out[2] = raw.z;
                out[3] = raw.w;
            };
            return rankByQuads<GROUP>(keys[slot], index, loadQuad) < mSelection.n;
        }
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

} // namespace nmexport::cuda
