// The rows that a few tokens keep of a stored W: queued by a warp, their segments loaded into the
// lanes that the tensor cores want them in. See stored_kernel.cuh.
#pragma once

#include "decode_memory.h"
#include "device_primitives.cuh"
#include "stored_dispatch.cuh"
#include "stored_weights.cuh"
#include "warp.cuh"

#include <type_traits>

namespace nmexport::cuda {

//! One warp's shared memory: its sums, and a ring of rows to multiply.
template <int TOKENS, int COLUMNS, int RING>
struct alignas(16) StoredScratch {
    float sums[TOKENS * COLUMNS];  //!< first: see sumOverWarps
    uint16_t value[RING][TOKENS];
    int32_t row[RING];
};

//! TOKENS: 1, or 8 of which some may be missing. UNROLL: loads of a lane in flight; of 4 bits a
//! weight, eight of them are of 8 bytes each, for narrow tiles of few outputs.
template <typename T, Storage STORAGE_, int TOKENS_, int WARPS_, int UNROLL_>
struct StoredShape {
    using Element = T;
    static constexpr Storage STORAGE = STORAGE_;
    static constexpr int TOKENS = TOKENS_;
    static constexpr int WARPS = WARPS_;
    static constexpr int UNROLL = UNROLL_;
    static constexpr bool MOMENTS = false;
    using Reader = PairReader<T, STORAGE, TOKENS>;
    static_assert(TOKENS == 1 || TOKENS == 8);

    static constexpr int THREADS = WARPS * kWARP;
    static constexpr int LANES_PER_ROW = 8;
    using Vector = std::conditional_t<hasHalfVectors(STORAGE, TOKENS, UNROLL), uint2, uint4>;
    static constexpr int WORDS = sizeof(Vector) / sizeof(uint32_t);
    static constexpr int WIDTH = WORDS * kPER_WORD<STORAGE>;  //!< columns of one lane
    static constexpr int COLUMNS = LANES_PER_ROW * WIDTH;
    static constexpr int PRODUCTS = WIDTH / 2;  //!< of 16 outputs each
    static constexpr int STEPS = UNROLL / 4;    //!< of 16 rows each, in flight
    static constexpr int BATCH = 16 * STEPS;
    static constexpr int RING = ringEntries(BATCH);
    static_assert(2 * BATCH + 2 * kWARP <= RING);
    static constexpr int SLOTS = 8 / TOKENS;  //!< groups that are summed side by side

    //! Which column of the tile lies at a place of a warp's sums: one token's lie as its lanes
    //! leave them, see flushGroups.
    __device__ static int32_t columnAt(int place) {
        int const lane = place % kWARP;
        return TOKENS == 1 ? lane / 4 * WIDTH + place / kWARP * 4 + lane % 4 : place;
    }

    using Scratch = StoredScratch<TOKENS, COLUMNS, RING>;
    static constexpr DecodeFootprint FOOTPRINT{TOKENS, COLUMNS, WARPS, sizeof(Scratch)};
};

//! Cuts a warp's channels into windows of whole sets of groups.
struct Windows {
    int32_t shift;  //!< a window has 1 << shift channels
    int32_t end;    //!< of the slice

    //! The end of the window that a channel lies in.
    __device__ int32_t endOf(int32_t channel) const {
        return min(((channel >> shift) + 1) << shift, end);
    }
};

//! Queues the rows that any token keeps, 64 channels of a window at a time, two a lane.
template <typename Shape>
class KeptRows {
  public:
    using T = typename Shape::Element;
    using Scratch = typename Shape::Scratch;

    __device__ KeptRows(Scratch* scratch, T const* x, int32_t channels, int tokens, int32_t begin,
                        Windows const& windows)
        : mScratch{scratch},
          mX{x},
          mChannels{channels},
          mTokens{tokens},
          mNext{begin},
          mWindows{windows} {}

    //! First loads of values; call right after the wait for the kernel that makes them.
    __device__ void begin() {
        read(mWords[0], mNext);
        if constexpr (AHEAD == 1) {
            read(mWords[1], chunkEnd(mNext));
        }
    }

    //! Queues rows until `wanted` are there or the window is at its end.
    __device__ void fill(uint32_t wanted, int32_t windowEnd) {
        while (tail - head < wanted && mNext < windowEnd) {
            append();
        }
        __syncwarp();
    }

    uint32_t head{0};  //!< first queued entry, counted from the start of the slice
    uint32_t tail{0};  //!< one past the last

  private:
    //! Chunks that are read ahead of the one to append next; eight tokens have no registers for it.
    static constexpr int AHEAD = Shape::TOKENS == 1 ? 1 : 0;

    __device__ int32_t chunkEnd(int32_t begin) const {
        return min(begin + 2 * kWARP, mWindows.endOf(begin));
    }

    __device__ static int32_t positionIn(int32_t begin) {
        return begin + 2 * static_cast<int32_t>(threadIdx.x % kWARP);
    }

    __device__ void read(uint32_t (&words)[Shape::TOKENS], int32_t begin) const {
        int32_t const position = positionIn(begin);
        bool const isThere = begin < mWindows.end && position < chunkEnd(begin);
#pragma unroll
        for (int token = 0; token < Shape::TOKENS; ++token) {
            words[token] = 0U;
            if (isThere && token < mTokens) {
                words[token] =
                    loadActivationWord(mX + static_cast<int64_t>(token) * mChannels + position);
            }
        }
    }

    __device__ void append() {
        uint32_t magnitudes = 0U;
#pragma unroll
        for (int token = 0; token < Shape::TOKENS; ++token) {
            magnitudes |= mWords[0][token] & 0x7fff7fffU;
        }
        bool const keeps[2] = {(magnitudes & 0xffffU) != 0U, magnitudes >> 16 != 0U};
        uint32_t const lows = __ballot_sync(kWHOLE_WARP, keeps[0]);
        uint32_t const highs = __ballot_sync(kWHOLE_WARP, keeps[1]);
        uint32_t const before = (1U << (threadIdx.x % kWARP)) - 1U;
        uint32_t place = tail + __popc(lows & before) + __popc(highs & before);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if (keeps[half]) {
                put(place % Shape::RING, half);
                ++place;
            }
        }
        tail += __popc(lows) + __popc(highs);
        mNext = chunkEnd(mNext);
        if constexpr (AHEAD == 1) {
            mWords[0][0] = mWords[1][0];
            if (mNext < mWindows.end) {
                read(mWords[1], chunkEnd(mNext));
            }
        } else {
            read(mWords[0], mNext);
        }
    }

    //! A row into the ring, the first or the second of this lane's two.
    __device__ void put(uint32_t place, int half) {
        mScratch->row[place] = positionIn(mNext) + half;
        if constexpr (Shape::TOKENS == 1) {
            mScratch->value[place][0] = static_cast<uint16_t>(mWords[0][0] >> 16 * half);
        } else {
            uint32_t const selector = half == 0 ? 0x5410U : 0x7632U;
            uint32_t const(&words)[Shape::TOKENS] = mWords[0];
            *reinterpret_cast<uint4*>(mScratch->value[place]) =
                make_uint4(__byte_perm(words[0], words[1], selector),
                           __byte_perm(words[2], words[3], selector),
                           __byte_perm(words[4], words[5], selector),
                           __byte_perm(words[6], words[7], selector));
        }
    }

    Scratch* mScratch;
    T const* mX;
    int32_t mChannels;
    int mTokens;
    int32_t mNext;
    Windows mWindows;
    uint32_t mWords[1 + AHEAD][Shape::TOKENS];  //!< of the chunk to append next, and behind it
};

//! The columns that a lane reads of every row, and its place in a product.
struct StoredLane {
    unsigned char const* w;  //!< W at the lane's first column
    int32_t rowBytes;
    int32_t column;  //!< the first one
    int32_t groupShift;

    //! The lane's column of values, and its group of eight outputs.
    __device__ static uint32_t g() { return threadIdx.x % kWARP / 4; }

    //! Which four of sixteen rows the lane holds.
    __device__ static uint32_t t() { return threadIdx.x % 4; }
};

//! One batch of rows, in flight, and the values that it meets.
template <typename Shape>
struct StoredBatch {
    typename Shape::Vector raw[Shape::UNROLL];
    uint32_t values[Shape::STEPS][2];  //!< operand b of each step
};

//! The bits of the value that a queued row has in this lane's column.
template <typename Shape>
__device__ __forceinline__ uint32_t valueOf(typename Shape::Scratch const& scratch, uint32_t place,
                                            int32_t row, StoredLane const& lane) {
    if constexpr (Shape::TOKENS == 1) {
        uint32_t const slot = static_cast<uint32_t>(row) >> lane.groupShift & 7U;
        return slot == StoredLane::g() ? scratch.value[place][0] : 0U;
    } else {
        return scratch.value[place][StoredLane::g()];
    }
}

//! Issues the loads of one batch: UNROLL independent vectors per lane.
template <typename Shape, bool WHOLE>
__device__ __forceinline__ void loadBatch(StoredBatch<Shape>& batch,
                                          typename Shape::Scratch const& scratch,
                                          StoredLane const& lane, uint32_t head, uint32_t count) {
#pragma unroll
    for (int load = 0; load < Shape::UNROLL; ++load) {
        uint32_t const entry = 4 * load + StoredLane::t();
        bool const isThere = WHOLE || entry < count;
        uint32_t const place = (head + entry) % Shape::RING;
        int32_t const row = isThere ? scratch.row[place] : 0;
        batch.raw[load] = {};
        uint32_t bits = 0U;
        if (isThere) {
            unsigned char const* const at = lane.w + static_cast<int64_t>(row) * lane.rowBytes;
            batch.raw[load] = loadStreaming<typename Shape::Vector>(at);
            bits = valueOf<Shape>(scratch, place, row, lane);
        }
        uint32_t& pair = batch.values[load / 4][load / 2 % 2];
        pair = load % 2 == 0 ? bits : pair | bits << 16;
    }
}

}  // namespace nmexport::cuda
