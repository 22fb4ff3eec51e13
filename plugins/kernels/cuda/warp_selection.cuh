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

//! A queued row of W and what each token multiplies it with; one shared-memory access up to three tokens.
template <int TOKENS>
struct alignas(TOKENS == 1 ? 8 : 16) Kept
{
    int32_t channel;
    float value[TOKENS];
};

//! One warp's shared memory: a window of channels to rank and a ring of kept ones to multiply.
template <int TOKENS, int RING>
struct alignas(16) WarpScratch
{
    uint32_t key[TOKENS][kWINDOW];
    float z[TOKENS][kWINDOW];
    int32_t channel[kWINDOW];
    Kept<TOKENS> queue[RING];
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

    //! Loads that do not depend on the activations; call before waiting for the kernel that makes them.
    __device__ void prepare() {}

    //! First loads of activations; call right after that wait.
    __device__ void begin() {}

    //! Queues kept channels until at least `wanted` are there or the slice is at its end.
    __device__ void fill(uint32_t wanted)
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

    uint32_t head{0}; //!< first queued entry, counted from the start of the slice
    uint32_t tail{0}; //!< one past the last
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
                Kept<TOKENS> entry;
                entry.channel = mScratch->channel[slot];
#pragma unroll
                for (int token = 0; token < TOKENS; ++token)
                {
                    entry.value[token] = isKept[token] ? mScratch->z[token][slot] : 0.0F;
                }
                mScratch->queue[(tail + __popc(kept & ((1U << lane) - 1U))) % RING] = entry;
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

//! WarpSelector for groups of 16 of a 16-bit type, ranked by bare magnitude: two channels per lane in one word, lane to
//! lane by shuffles. A third of the instructions, which are what a short slice waits for.
template <typename T, int TOKENS, int RING, bool MOMENTS>
class PackedSelector
{
public:
    static_assert(sizeof(T) == 2);
    using Scratch = WarpScratch<TOKENS, RING>;

    __device__ PackedSelector(
        Scratch* scratch, Selection const& selection, T const* x, int32_t channels, Range slice, float const*)
        : mScratch{scratch}
        , mOrder{selection.channelOrder}
        , mX{x}
        , mChannels{channels}
        , mKeep{selection.n}
        , mNext{slice.begin}
        , mEnd{slice.end}
    {
    }

    __device__ void prepare()
    {
        readOrder();
    }

    __device__ void begin()
    {
        readWords();
    }

    __device__ void fill(uint32_t wanted)
    {
        while (tail - head < wanted && mNext < mEnd)
        {
            append();
        }
        __syncwarp();
    }

    uint32_t head{0};
    uint32_t tail{0};
    Moments moments[MOMENTS ? TOKENS : 1];

private:
    static constexpr int32_t kCHUNK = 2 * kWARP;

    __device__ int32_t position() const
    {
        return mNext + 2 * static_cast<int32_t>(threadIdx.x % kWARP);
    }

    //! The lane's two channels of the next chunk.
    __device__ void readOrder()
    {
        mChannel = make_int2(position(), position() + 1);
        if (mOrder != nullptr && position() < mEnd)
        {
            mChannel = make_int2(__ldg(mOrder + position()), __ldg(mOrder + position() + 1));
        }
    }

    __device__ void readWords()
    {
#pragma unroll
        for (int token = 0; token < TOKENS; ++token)
        {
            T const* const x = mX + static_cast<int64_t>(token) * mChannels;
            mWord[token] = 0U;
            if (position() < mEnd)
            {
                mWord[token] = mOrder == nullptr
                    ? loadActivationWord(x + mChannel.x)
                    : loadActivationBits(x + mChannel.x) | loadActivationBits(x + mChannel.y) << 16;
            }
        }
    }

    __device__ void append()
    {
        uint32_t const lane = threadIdx.x % kWARP;
        bool const isActive = position() < mEnd;
        bool keepsLow[TOKENS];
        bool keepsHigh[TOKENS];
        bool anyLow = false;
        bool anyHigh = false;
#pragma unroll
        for (int token = 0; token < TOKENS; ++token)
        {
            uint32_t const keys = packedKeys(mWord[token], kNAN_KEY<T>);
            PackedRank rank(keys);
#pragma unroll
            for (uint32_t step = 1; step < 8; ++step)
            {
                uint32_t const topBit = step >= 4 ? 4 : (step >= 2 ? 2 : 1);
                rank.meet(__shfl_xor_sync(kWHOLE_WARP, keys, step), (lane & topBit) != 0U);
            }
            keepsLow[token] = isActive && rank.keepsLow(mKeep);
            keepsHigh[token] = isActive && rank.keepsHigh(mKeep);
            anyLow = anyLow || keepsLow[token];
            anyHigh = anyHigh || keepsHigh[token];
            if constexpr (MOMENTS)
            {
                if (isActive)
                {
                    moments[token].add(lowOf(mWord[token]), keepsLow[token]);
                    moments[token].add(highOf(mWord[token]), keepsHigh[token]);
                }
            }
        }
        uint32_t const lows = __ballot_sync(kWHOLE_WARP, anyLow);
        uint32_t const highs = __ballot_sync(kWHOLE_WARP, anyHigh);
        uint32_t const before = (1U << lane) - 1U;
        uint32_t const place = tail + __popc(lows & before) + __popc(highs & before);
        Kept<TOKENS> entry;
        if (anyLow)
        {
            entry.channel = mChannel.x;
#pragma unroll
            for (int token = 0; token < TOKENS; ++token)
            {
                entry.value[token] = keepsLow[token] ? lowOf(mWord[token]) : 0.0F;
            }
            mScratch->queue[place % RING] = entry;
        }
        if (anyHigh)
        {
            entry.channel = mChannel.y;
#pragma unroll
            for (int token = 0; token < TOKENS; ++token)
            {
                entry.value[token] = keepsHigh[token] ? highOf(mWord[token]) : 0.0F;
            }
            mScratch->queue[(place + (anyLow ? 1U : 0U)) % RING] = entry;
        }
        tail += __popc(lows) + __popc(highs);
        mNext += kCHUNK;
        readOrder();
        readWords();
    }

    __device__ static float lowOf(uint32_t word)
    {
        return toFloat(wordHalf<T>(word & 0xffffU));
    }

    __device__ static float highOf(uint32_t word)
    {
        return toFloat(wordHalf<T>(word >> 16));
    }

    Scratch* mScratch;
    int32_t const* mOrder;
    T const* mX;
    int32_t mChannels;
    int32_t mKeep;
    int32_t mNext;
    int32_t mEnd;
    int2 mChannel;           //!< of the chunk to append next
    uint32_t mWord[TOKENS]; //!< its activations
};

} // namespace nmexport::cuda
