// A warp ranks and queues its slice of channels in groups of 16, two positions a lane: see
// warp_selection.cuh.
#pragma once

#include "warp_selection.cuh"

namespace nmexport::cuda {

//! The queue's end after a lane's two positions, `first` the earlier, were put in order behind
//! `tail`, each where any token keeps it.
template <int TOKENS, int RING>
__device__ __forceinline__ uint32_t queuePair(WarpScratch<TOKENS, RING>* scratch, uint32_t tail,
                                              int32_t first, bool const (&keeps)[TOKENS][2],
                                              float const (&z)[TOKENS][2]) {
    bool isKept[2] = {false, false};
#pragma unroll
    for (int token = 0; token < TOKENS; ++token) {
        isKept[0] = isKept[0] || keeps[token][0];
        isKept[1] = isKept[1] || keeps[token][1];
    }
    uint32_t const lows = __ballot_sync(kWHOLE_WARP, isKept[0]);
    uint32_t const highs = __ballot_sync(kWHOLE_WARP, isKept[1]);
    uint32_t const before = (1U << (threadIdx.x % kWARP)) - 1U;
    uint32_t const place = tail + __popc(lows & before) + __popc(highs & before);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        if (isKept[half]) {
            Kept<TOKENS> entry;
            entry.row = first + half;
#pragma unroll
            for (int token = 0; token < TOKENS; ++token) {
                entry.value[token] = keeps[token][half] ? z[token][half] : 0.0F;
            }
            scratch->queue[(place + (half == 1 && isKept[0] ? 1U : 0U)) % RING] = entry;
        }
    }
    return tail + __popc(lows) + __popc(highs);
}

//! Shared by the two selectors of groups of 16: two neighbouring positions per lane, 64 per step,
//! keys exchanged by shuffles, no shared memory before the queue.
//!
//!   lane       0      1    ...   7    |  8     9    ...        16 ...        24 ...
//!   position  0 1    2 3       14 15  | 16 17                  32            48
//!             `---- group 0 -------'    `---- group 1 ...
//!
//! A channel order moves the loads of x alone, which a warp then gathers from one token's row.
template <int TOKENS, int RING, bool MOMENTS>
struct PairWalk {
    using Scratch = WarpScratch<TOKENS, RING>;
    static constexpr int32_t kCHUNK = 2 * kWARP;

    uint32_t head{0};  //!< first queued entry, counted from the start of the slice
    uint32_t tail{0};  //!< one past the last
    Moments moments[MOMENTS ? TOKENS : 1];

  protected:
    __device__ PairWalk(Scratch* scratch, int32_t const* order, Range slice)
        : mScratch{scratch}, mOrder{order}, mNext{slice.begin}, mEnd{slice.end} {}

    __device__ int32_t position() const {
        return mNext + 2 * static_cast<int32_t>(threadIdx.x % kWARP);
    }

    __device__ bool isActive() const { return position() < mEnd; }

    //! Which channels of x the lane's two positions of the first two chunks hold.
    __device__ void readOrder() {
        mChannel = channelsOf(position());
        mChannelAhead = channelsOf(position() + kCHUNK);
    }

    //! Moves to the next chunk. The order of the one behind it is asked for now: it comes from far.
    __device__ void advance() {
        mNext += kCHUNK;
        mChannel = mChannelAhead;
        mChannelAhead = channelsOf(position() + kCHUNK);
    }

    __device__ void addMoments(int token, float const (&z)[2], bool const (&keeps)[2]) {
        if (MOMENTS && isActive()) {
            moments[token].add(z[0], keeps[0]);
            moments[token].add(z[1], keeps[1]);
        }
    }

    Scratch* mScratch;
    int32_t const* mOrder;
    int32_t mNext;
    int32_t mEnd;
    int2 mChannel;       //!< of x, of the chunk to append next
    int2 mChannelAhead;  //!< of the one behind it

  private:
    __device__ int2 channelsOf(int32_t position) const {
        bool const isLookedUp = mOrder != nullptr && position < mEnd;
        return isLookedUp ? make_int2(__ldg(mOrder + position), __ldg(mOrder + position + 1))
                          : make_int2(position, position + 1);
    }
};

//! Groups of 16 of a 16-bit type, ranked by bare magnitude: two keys per word, compared two at a
//! time.
template <typename T, int TOKENS, int RING, bool MOMENTS>
class PackedSelector : public PairWalk<TOKENS, RING, MOMENTS> {
  public:
    static_assert(sizeof(T) == 2);
    using Walk = PairWalk<TOKENS, RING, MOMENTS>;
    using typename Walk::Scratch;

    __device__ PackedSelector(Scratch* scratch, Selection const& selection, T const* x,
                              int32_t channels, Range slice, float const*)
        : Walk(scratch, selection.channelOrder, slice),
          mX{x},
          mChannels{channels},
          mKeep{selection.n} {}

    __device__ void prepare() { this->readOrder(); }

    __device__ void begin() { readWords(); }

    __device__ void fill(uint32_t wanted) {
        while (this->tail - this->head < wanted && this->mNext < this->mEnd) {
            append();
        }
        __syncwarp();
    }

  private:
    __device__ void readWords() {
#pragma unroll
        for (int token = 0; token < TOKENS; ++token) {
            T const* const x = mX + static_cast<int64_t>(token) * mChannels;
            mWord[token] = 0U;
            if (this->isActive()) {
                mWord[token] = this->mOrder == nullptr
                                   ? loadActivationWord(x + this->mChannel.x)
                                   : loadActivationBits(x + this->mChannel.x) |
                                         loadActivationBits(x + this->mChannel.y) << 16;
            }
        }
    }

    __device__ void append() {
        bool keeps[TOKENS][2];
        float z[TOKENS][2];
#pragma unroll
        for (int token = 0; token < TOKENS; ++token) {
            uint32_t const keys = packedKeys(mWord[token], kNAN_KEY<T>);
            PackedRank rank(keys);
#pragma unroll
            for (uint32_t step = 1; step < 8; ++step) {
                rank.meet(__shfl_xor_sync(kWHOLE_WARP, keys, step), otherLaneIsEarlier(step));
            }
            keeps[token][0] = this->isActive() && rank.keepsLow(mKeep);
            keeps[token][1] = this->isActive() && rank.keepsHigh(mKeep);
            z[token][0] = toFloat(wordHalf<T>(mWord[token] & 0xffffU));
            z[token][1] = toFloat(wordHalf<T>(mWord[token] >> 16));
            this->addMoments(token, z[token], keeps[token]);
        }
        this->tail = queuePair(this->mScratch, this->tail, this->position(), keeps, z);
        this->advance();
        readWords();
    }

    T const* mX;
    int32_t mChannels;
    int32_t mKeep;
    uint32_t mWord[TOKENS];  //!< the activations of the chunk to append next
};

//! An x of a 16-bit type that is pruned already and lies by position: what is not zero is kept.
template <typename T, int RING>
class NonZeroSelector : public PairWalk<1, RING, false> {
  public:
    static_assert(sizeof(T) == 2);
    using Walk = PairWalk<1, RING, false>;
    using typename Walk::Scratch;

    __device__ NonZeroSelector(Scratch* scratch, Selection const&, T const* x, int32_t, Range slice,
                               float const*)
        : Walk(scratch, nullptr, slice), mX{x} {}

    __device__ void prepare() {}

    __device__ void begin() {
        mWord = wordAt(this->position());
        mWordAhead = wordAt(this->position() + Walk::kCHUNK);
    }

    __device__ void fill(uint32_t wanted) {
        while (this->tail - this->head < wanted && this->mNext < this->mEnd) {
            append();
        }
        __syncwarp();
    }

  private:
    __device__ uint32_t wordAt(int32_t position) const {
        return position < this->mEnd ? loadActivationWord(mX + position) : 0U;
    }

    __device__ void append() {
        bool const keeps[1][2] = {{(mWord & 0x7fffU) != 0U, (mWord & 0x7fff0000U) != 0U}};
        float const z[1][2] = {
            {toFloat<T>(wordHalf<T>(mWord & 0xffffU)), toFloat<T>(wordHalf<T>(mWord >> 16))}};
        this->tail = queuePair(this->mScratch, this->tail, this->position(), keeps, z);
        this->mNext += Walk::kCHUNK;
        mWord = mWordAhead;
        mWordAhead = wordAt(this->position() + Walk::kCHUNK);
    }

    T const* mX;
    uint32_t mWord;       //!< the activations of the chunk to append next
    uint32_t mWordAhead;  //!< of the one behind it
};

//! Groups of 16 with every option and type: float32 keys.
template <typename T, int TOKENS, int RING, bool MOMENTS>
class WideSelector : public PairWalk<TOKENS, RING, MOMENTS> {
  public:
    using Walk = PairWalk<TOKENS, RING, MOMENTS>;
    using typename Walk::Scratch;

    __device__ WideSelector(Scratch* scratch, Selection const& selection, T const* x,
                            int32_t channels, Range slice, float const* eta)
        : Walk(scratch, selection.channelOrder, slice),
          mSelection{selection},
          mX{x},
          mChannels{channels},
          mEta{eta} {}

    __device__ void prepare() {
        this->readOrder();
        readConstants();
    }

    __device__ void begin() { readActivations(); }

    __device__ void fill(uint32_t wanted) {
        while (this->tail - this->head < wanted && this->mNext < this->mEnd) {
            append();
        }
        __syncwarp();
    }

  private:
    //! Shifts and scales of the next chunk: constants (see Selection), so none that the kernel
    //! before writes.
    __device__ void readConstants() {
        mShift[0] = mShift[1] = 0.0F;
        mScale[0] = mScale[1] = 1.0F;
        mValueScale[0] = mValueScale[1] = 1.0F;
        if (!this->isActive()) {
            return;
        }
        int32_t const position = this->position();
        if (mSelection.shiftLength > 0) {
            bool const isScalar = mSelection.shiftLength == 1;
            mShift[0] = __ldg(mSelection.shift + (isScalar ? 0 : position));
            mShift[1] = __ldg(mSelection.shift + (isScalar ? 0 : position + 1));
        }
        if (mSelection.scoreScale != nullptr) {
            mScale[0] = __ldg(mSelection.scoreScale + position);
            mScale[1] = __ldg(mSelection.scoreScale + position + 1);
        }
        if (mSelection.valueScale != nullptr) {
            mValueScale[0] = __ldg(mSelection.valueScale + position);
            mValueScale[1] = __ldg(mSelection.valueScale + position + 1);
        }
    }

    __device__ void readActivations() {
#pragma unroll
        for (int token = 0; token < TOKENS; ++token) {
            T const* const x = mX + static_cast<int64_t>(token) * mChannels;
            mActivation[token][0] = this->isActive() ? loadActivation(x + this->mChannel.x) : 0.0F;
            mActivation[token][1] = this->isActive() ? loadActivation(x + this->mChannel.y) : 0.0F;
        }
    }

    __device__ uint32_t keyOf(float z, float scale) const {
        return mSelection.scoreScale == nullptr ? magnitudeKey(z)
                                                : orderedKey(scaledScore(z, scale));
    }

    __device__ void append() {
        bool keeps[TOKENS][2];
        float z[TOKENS][2];
#pragma unroll
        for (int token = 0; token < TOKENS; ++token) {
            z[token][0] =
                mActivation[token][0] - (mSelection.dynamicShift ? mEta[token] : mShift[0]);
            z[token][1] =
                mActivation[token][1] - (mSelection.dynamicShift ? mEta[token] : mShift[1]);
            WideRank rank(keyOf(z[token][0], mScale[0]), keyOf(z[token][1], mScale[1]));
#pragma unroll
            for (uint32_t step = 1; step < 8; ++step) {
                uint32_t const low = __shfl_xor_sync(kWHOLE_WARP, rank.low, step);
                uint32_t const high = __shfl_xor_sync(kWHOLE_WARP, rank.high, step);
                rank.meet(low, high, otherLaneIsEarlier(step));
            }
            keeps[token][0] = this->isActive() && rank.beforeLow < mSelection.n;
            keeps[token][1] = this->isActive() && rank.beforeHigh < mSelection.n;
            this->addMoments(token, z[token], keeps[token]);
            z[token][0] *= mValueScale[0];
            z[token][1] *= mValueScale[1];
        }
        this->tail = queuePair(this->mScratch, this->tail, this->position(), keeps, z);
        this->advance();
        readConstants();
        readActivations();
    }

    Selection const& mSelection;
    T const* mX;
    int32_t mChannels;
    float const* mEta;
    float mActivation[TOKENS][2];  //!< of the chunk to append next
    float mShift[2];
    float mScale[2];       //!< of scores
    float mValueScale[2];  //!< of kept values
};

}  // namespace nmexport::cuda
