// Linears of a few tokens on rows of W as they are stored, by tensor cores: a warp queues the rows
// that its tokens keep, streams their segments and turns them into operands in registers.
//
// A product of 16 outputs, 16 rows and 8 columns of values: eight lanes read 16 bytes of one row
// each, four rows at a time, which puts every stored value into the lane that the product wants it
// in.
//
//     lane 4 g + t:  bytes 16 g ... of rows t, 4 + t, 8 + t, 12 + t of a step of 16 queued rows
//
// With narrow tiles it reads 8 bytes in place of 16.
//
// The 8 columns of values are tokens, or the scale groups of one token: a value stands in its own
// group's column, so that eight groups are summed side by side and scaled once, at the end of a
// window. Sums then meet as in decode_kernel.cuh.
#pragma once

#include "decode_kernel.cuh"
#include "stored_dispatch.cuh"
#include "stored_weights.cuh"

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

//! Where a lane reads in every row, and its place in a product.
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

//! The sums of a window: of the products, and of the values alone, which zero points and offsets
//! of the operands take off.
template <typename Shape>
struct StoredSums {
    float product[Shape::PRODUCTS][4];
    float values[4];

    __device__ void clear() {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            values[i] = 0.0F;
#pragma unroll
            for (int p = 0; p < Shape::PRODUCTS; ++p) {
                product[p][i] = 0.0F;
            }
        }
    }
};

__device__ __forceinline__ uint32_t wordOf(uint4 const& raw, int word) {
    return word == 0 ? raw.x : (word == 1 ? raw.y : (word == 2 ? raw.z : raw.w));
}

__device__ __forceinline__ uint32_t wordOf(uint2 const& raw, int word) {
    return word == 0 ? raw.x : raw.y;
}

//! sums += one loaded batch.
template <typename Shape>
__device__ __forceinline__ void multiplyBatch(StoredSums<Shape>& sums,
                                              StoredBatch<Shape> const& batch,
                                              typename Shape::Reader const& reader,
                                              bool hasZeroPoint) {
    using T = typename Shape::Element;
    using Reader = typename Shape::Reader;
    constexpr int kPAIRS = kPER_WORD<Shape::STORAGE>;
#pragma unroll
    for (int step = 0; step < Shape::STEPS; ++step) {
        uint32_t const b0 = batch.values[step][0];
        uint32_t const b1 = batch.values[step][1];
        if (Reader::OFFSETS || hasZeroPoint) {
            constexpr uint32_t kONES = std::is_same_v<T, __half> ? 0x3c003c00U : 0x3f803f80U;
            multiplyTiles<T>(sums.values, kONES, kONES, kONES, kONES, b0, b1);
        }
        typename Shape::Vector const* const raw = batch.raw + 4 * step;
#pragma unroll
        for (int word = 0; word < Shape::WORDS; ++word) {
            uint32_t near[kPAIRS];
            uint32_t far[kPAIRS];
            reader.read(wordOf(raw[0], word), wordOf(raw[1], word), near);
            reader.read(wordOf(raw[2], word), wordOf(raw[3], word), far);
#pragma unroll
            for (int i = 0; i < kPAIRS; i += 2) {
                multiplyTiles<T>(sums.product[(word * kPAIRS + i) / 2], near[i], near[i + 1],
                                 far[i], far[i + 1], b0, b1);
            }
        }
    }
}

//! All rows of a window; the next batch is queued while one is in flight.
template <typename Shape>
__device__ __forceinline__ void streamWindow(StoredSums<Shape>& sums, KeptRows<Shape>& rows,
                                             typename Shape::Scratch const& scratch,
                                             StoredLane const& lane,
                                             typename Shape::Reader const& reader,
                                             bool hasZeroPoint, int32_t windowEnd) {
    StoredBatch<Shape> batch;
    rows.fill(Shape::BATCH, windowEnd);
    while (rows.tail - rows.head >= Shape::BATCH) {
        loadBatch<Shape, true>(batch, scratch, lane, rows.head, Shape::BATCH);
        rows.head += Shape::BATCH;
        rows.fill(Shape::BATCH, windowEnd);
        multiplyBatch<Shape>(sums, batch, reader, hasZeroPoint);
    }
    uint32_t const rest = rows.tail - rows.head;
    if (rest > 0) {
        loadBatch<Shape, false>(batch, scratch, lane, rows.head, rest);
        rows.head = rows.tail;
        multiplyBatch<Shape>(sums, batch, reader, hasZeroPoint);
    }
    __syncwarp();  // every lane has read its values before the ring is written again
}

//! totals += scale * (factor * sum - (offset + zero) * values) of four neighbouring outputs, the
//! lane's from `first` on, in column `which` of its two of a product; `index` is that of the first
//! output in [G, O].
template <typename Shape>
__device__ __forceinline__ void addScaled(float (&totals)[4], StoredSums<Shape> const& sums,
                                          int first, int which, StoredWeights const& stored,
                                          int64_t index) {
    typename Shape::Reader const reader(stored.type);
    float4 const scales = scalesAt<typename Shape::Element>(stored, index);
    float const scale[4] = {scales.x, scales.y, scales.z, scales.w};
    float part[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        float const(&product)[4] = sums.product[(first + i) / 2];
        Encoding const encoding = reader.encodingOf(i);  // words begin at multiples of 4
        part[i] = which == 0 ? product[i % 2 * 2] : product[i % 2 * 2 + 1];
        if constexpr (Shape::Reader::OFFSETS) {
            part[i] = fmaf(-encoding.offset, sums.values[which], encoding.factor * part[i]);
        }
    }
    if (stored.zeroPoint != nullptr) {
        float4 const zeros = zerosAt<Shape::STORAGE>(stored, index);
        float const zero[4] = {zeros.x, zeros.y, zeros.z, zeros.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            part[i] = fmaf(-zero[i], sums.values[which], part[i]);
        }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        totals[i] = fmaf(scale[i], part[i], totals[i]);
    }
}

//! The total of four lanes that share outputs: lane t is left with that of the t-th.
__device__ __forceinline__ float addOverFour(float const (&totals)[4]) {
    bool const isUpper = (threadIdx.x & 2) != 0;
    bool const isOdd = (threadIdx.x & 1) != 0;
    float half[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        float const sent = isUpper ? totals[i] : totals[2 + i];
        half[i] = (isUpper ? totals[2 + i] : totals[i]) + __shfl_xor_sync(kWHOLE_WARP, sent, 2);
    }
    return (isOdd ? half[1] : half[0]) + __shfl_xor_sync(kWHOLE_WARP, isOdd ? half[0] : half[1], 1);
}

//! Scales the sums of a window of one token, its groups side by side, and adds them to the warp's.
template <typename Shape>
__device__ __forceinline__ void flushGroups(StoredSums<Shape> const& sums,
                                            typename Shape::Scratch* scratch,
                                            LinearArgs const& args, StoredLane const& lane,
                                            int32_t firstGroup, int32_t lastGroup) {
    int32_t const group = firstGroup / 8 * 8 + 2 * static_cast<int32_t>(StoredLane::t());
#pragma unroll
    for (int first = 0; first < Shape::WIDTH; first += 4) {
        float totals[4] = {};
#pragma unroll
        for (int which = 0; which < 2; ++which) {
            if (firstGroup <= group + which && group + which <= lastGroup) {
                int64_t const index =
                    static_cast<int64_t>(group + which) * args.outputs + lane.column + first;
                addScaled<Shape>(totals, sums, first, which, args.stored, index);
            }
        }
        scratch->sums[first / 4 * kWARP + threadIdx.x % kWARP] += addOverFour(totals);
    }
}

//! The same for eight tokens, all of one group.
template <typename Shape>
__device__ __forceinline__ void flushTokens(StoredSums<Shape> const& sums,
                                            typename Shape::Scratch* scratch,
                                            LinearArgs const& args, StoredLane const& lane,
                                            int32_t group) {
    int64_t const index = static_cast<int64_t>(group) * args.outputs + lane.column;
#pragma unroll
    for (int first = 0; first < Shape::WIDTH; first += 4) {
#pragma unroll
        for (int which = 0; which < 2; ++which) {
            float totals[4] = {};
            addScaled<Shape>(totals, sums, first, which, args.stored, index + first);
            float* const target = scratch->sums + (2 * StoredLane::t() + which) * Shape::COLUMNS +
                                  StoredLane::g() * Shape::WIDTH + first;
            float4& four = *reinterpret_cast<float4*>(target);
            four = make_float4(four.x + totals[0], four.y + totals[1], four.z + totals[2],
                               four.w + totals[3]);
        }
    }
}

//! Scales the sums of the window [begin, end), adds them to the warp's and begins anew.
template <typename Shape>
__device__ __forceinline__ void flushWindow(StoredSums<Shape>& sums,
                                            typename Shape::Scratch* scratch,
                                            LinearArgs const& args, StoredLane const& lane,
                                            int32_t begin, int32_t end) {
    int32_t const firstGroup = begin >> lane.groupShift;
    if constexpr (Shape::TOKENS == 1) {
        flushGroups<Shape>(sums, scratch, args, lane, firstGroup, (end - 1) >> lane.groupShift);
    } else {
        flushTokens<Shape>(sums, scratch, args, lane, firstGroup);
    }
    sums.clear();
}

//! Asks the second-level cache for `bytes` from an address, by one warp.
__device__ __forceinline__ void prefetchSegment(void const* address, int64_t bytes) {
    constexpr int kSECTOR = 32;
    for (int64_t offset = static_cast<int64_t>(threadIdx.x % kWARP) * kSECTOR; offset < bytes;
         offset += kWARP * kSECTOR) {
        prefetchToL2(static_cast<char const*>(address) + offset);
    }
}

//! Brings near what needs no wait: parameters, pages, the scales of the slice, and where every row
//! is kept the first rows.
template <typename Shape>
__device__ __forceinline__ void touchStored(StoredArgs const& args, StoredLane const& lane,
                                            int32_t firstColumn, Range slice) {
    LinearArgs const& linear = args.linear;
    asm volatile("" ::"l"(linear.y), "l"(linear.stored.scale), "l"(args.corrections.nu));
    if (threadIdx.x < kWARP) {
        prefetchToL2(static_cast<typename Shape::Element const*>(linear.x) + threadIdx.x);
        prefetchToL2(lane.w);
    }
    int64_t const columns = min(Shape::COLUMNS, linear.outputs - firstColumn);
    int64_t const scaleBytes = linear.stored.scaleIsT ? 2 : 4;
    for (int32_t channel = slice.begin; channel < slice.end;) {
        int64_t const group = channel >> lane.groupShift;
        int64_t const index = group * linear.outputs + firstColumn;
        prefetchSegment(static_cast<char const*>(linear.stored.scale) + index * scaleBytes,
                        columns * scaleBytes);
        channel = static_cast<int32_t>(min((group + 1) << lane.groupShift, int64_t{slice.end}));
    }
    if (!args.isDense) {
        return;
    }
#pragma unroll
    for (int load = 0; load < Shape::UNROLL; ++load) {
        int32_t const row = slice.begin + 4 * load + static_cast<int32_t>(StoredLane::t());
        if (row < slice.end) {
            prefetchToL2(lane.w + static_cast<int64_t>(row) * lane.rowBytes);
        }
    }
}

//! Rank 0: corrects, rounds once, stores.
template <typename Shape>
__device__ __forceinline__ void storeStored(StoredArgs const& args,
                                            DecodeShared<Shape> const& shared, int32_t firstColumn,
                                            int64_t firstToken, int tokens, int cluster) {
    using T = typename Shape::Element;
    for (int index = threadIdx.x; index < tokens * Shape::COLUMNS; index += Shape::THREADS) {
        int64_t const token = firstToken + index / Shape::COLUMNS;
        int32_t const column = firstColumn + Shape::columnAt(index % Shape::COLUMNS);
        if (column >= args.linear.outputs) {
            continue;
        }
        float sum = sumOverRanks(shared, index, cluster);
        if (args.corrections.nu != nullptr) {
            sum *= loadActivation(args.corrections.nu + token);
        }
        float const eta =
            args.corrections.eta == nullptr ? 0.0F : loadActivation(args.corrections.eta + token);
        storeOutput<T>(args.linear, token, column, sum, eta);
    }
}

//! CTAs per multiprocessor that the registers leave room for. Code for 8.9 and 12.0 needs a few
//! more of them for eight tokens, and their memory fewer loads in flight; code for chips that do
//! not convert 8-bit floats needs more of them for that.
template <typename Shape, int MIN_CTAS>
constexpr int residentCtas() {
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
    return Shape::TOKENS == 1 ? MIN_CTAS : 1;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 890
    return Shape::STORAGE == Storage::kFLOAT8 ? MIN_CTAS / 2 : MIN_CTAS;
#else
    return MIN_CTAS;
#endif
}

//! grid.x = tiles * cluster, as in decodeKernel; grid.y = tokens, or eights of tokens.
template <typename Shape, int MIN_CTAS>
__global__ void __launch_bounds__(Shape::THREADS, (residentCtas<Shape, MIN_CTAS>()))
    storedKernel(StoredArgs const args, bool const allowsNextLate) {
#if __CUDA_ARCH__ >= 800  // the products of older chips are smaller; nothing is launched there
    using T = typename Shape::Element;
    extern __shared__ __align__(16) unsigned char sharedBytes[];
    if (!allowsNextLate) {
        allowDependentLaunch();
    }
    LinearArgs const& linear = args.linear;
    int const cluster = static_cast<int>(clusterSize());
    uint32_t const rank = clusterRank();
    DecodeShared<Shape> const shared(sharedBytes, cluster);
    if (cluster > 1) {
        openMailbox(shared.mailbox, rank);
    }
    int const warp = threadIdx.x / kWARP;
    int32_t const firstColumn = static_cast<int32_t>(blockIdx.x / cluster) * Shape::COLUMNS;
    int32_t const ownColumn = firstColumn + static_cast<int32_t>(StoredLane::g()) * Shape::WIDTH;
    // A lane past the last column reads the first vector of its tile again and its sums are not
    // stored.
    int32_t const column = ownColumn < linear.outputs ? ownColumn : firstColumn;
    constexpr int kPER_BYTE = kPER_WORD<Shape::STORAGE> / 4;
    StoredLane const lane{static_cast<unsigned char const*>(linear.w) + column / kPER_BYTE,
                          linear.outputs / kPER_BYTE, column, args.groupShift};

    Range const units = splitRange(linear.channels / 16, cluster * Shape::WARPS,
                                   static_cast<int32_t>(rank) * Shape::WARPS + warp);
    Range const slice{units.begin * 16, units.end * 16};
    int64_t const firstToken = static_cast<int64_t>(blockIdx.y) * Shape::TOKENS;
    int const tokens = static_cast<int>(min(linear.tokens - firstToken, int64_t{Shape::TOKENS}));
    T const* const x = static_cast<T const*>(linear.x) + firstToken * linear.channels;
    constexpr int kSLOT_BITS = Shape::SLOTS == 8 ? 3 : 0;
    Windows const windows{args.groupShift + kSLOT_BITS, slice.end};
    typename Shape::Scratch* const scratch = shared.scratch + warp;
    KeptRows<Shape> rows(scratch, x, linear.channels, tokens, slice.begin, windows);
    typename Shape::Reader const reader(linear.stored.type);
    for (int i = threadIdx.x % kWARP; i < Shape::TOKENS * Shape::COLUMNS; i += kWARP) {
        scratch->sums[i] = 0.0F;
    }
    __syncwarp();
    touchStored<Shape>(args, lane, firstColumn, slice);
    waitForPredecessors();

    rows.begin();
    StoredSums<Shape> sums;
    sums.clear();
    bool const hasZeroPoint = linear.stored.zeroPoint != nullptr;
    for (int32_t begin = slice.begin; begin < slice.end;) {
        int32_t const end = windows.endOf(begin);
        streamWindow<Shape>(sums, rows, *scratch, lane, reader, hasZeroPoint, end);
        flushWindow<Shape>(sums, scratch, linear, lane, begin, end);
        begin = end;
    }
    if (allowsNextLate) {
        allowDependentLaunch();
    }
    if (gatherSums<Shape>(shared, rank, cluster)) {
        storeStored<Shape>(args, shared, firstColumn, firstToken, tokens, cluster);
    }
#endif
}

}  // namespace nmexport::cuda
