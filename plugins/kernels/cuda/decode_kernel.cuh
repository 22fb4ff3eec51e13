// NMLinear for a few tokens: y = nu * (s @ W) + eta * shiftWeight + bias, reading only the kept
// rows of W.
//
// A warp ranks its own channels, queues the kept ones and streams their row segments; it waits for
// no other warp until the end. Partial sums meet in shared memory, then over the cluster through
// distributed shared memory (decode_sums.cuh), always in index order: no atomics, no workspace,
// bit-equal from run to run.
#pragma once

#include "decode_sums.cuh"
#include "pair_selection.cuh"
#include "tile_launch.cuh"

#include <type_traits>

namespace nmexport::cuda {

//! How a warp ranks its channels.
enum class Ranking {
    kANY,     //!< any m and every option, through shared memory
    kWIDE,    //!< groups of 16, every option and type
    kPACKED,  //!< groups of 16 of a 16-bit type by bare magnitude
    kNONE,    //!< none: x of a 16-bit type is pruned already
};

//! Compile-time shape of one decode kernel.
//! VECTORS: neighbouring 16-byte vectors that a lane reads of each row.
//! OVERLAP: rank the next batch while one is in flight, at the price of registers.
//! ALIGNED: rows of W start on 16 bytes, so a lane reads a whole vector at once.
template <typename T, int TOKENS_, Ranking RANKING_, int LANES_PER_ROW_, int VECTORS_, int WARPS_,
          int UNROLL_, bool OVERLAP_, bool MOMENTS_, bool ALIGNED_>
struct DecodeShape {
    using Element = T;
    static constexpr int TOKENS = TOKENS_;
    static constexpr Ranking RANKING = RANKING_;
    static constexpr int LANES_PER_ROW = LANES_PER_ROW_;
    static constexpr int VECTORS = VECTORS_;
    static constexpr int WARPS = WARPS_;
    static constexpr int UNROLL = UNROLL_;
    static constexpr bool OVERLAP = OVERLAP_;
    static constexpr bool MOMENTS = MOMENTS_;
    static constexpr bool ALIGNED = ALIGNED_;

    static constexpr int THREADS = WARPS * kWARP;
    static constexpr int STRIPE = LANES_PER_ROW * kVECTOR<T>;  //!< columns of one load
    static constexpr int COLUMNS = STRIPE * VECTORS;
    static constexpr int WIDTH = kVECTOR<T> * VECTORS;  //!< columns of one lane
    static constexpr int ROWS_PER_LOAD = kWARP / LANES_PER_ROW;
    static constexpr int ROW_LOADS = UNROLL / VECTORS;
    static constexpr int BATCH = ROW_LOADS * ROWS_PER_LOAD;
    static_assert(UNROLL % VECTORS == 0);
    static constexpr int RING = ringEntries(BATCH);
    static_assert(2 * BATCH + kMAX_GROUP <= RING);
    static constexpr DecodeFootprint FOOTPRINT{TOKENS, COLUMNS, WARPS,
                                               warpScratchBytes(TOKENS, BATCH)};

    using Scratch = WarpScratch<TOKENS, RING>;
    using SixteenSelector =
        std::conditional_t<RANKING == Ranking::kPACKED, PackedSelector<T, TOKENS, RING, MOMENTS>,
                           WideSelector<T, TOKENS, RING, MOMENTS>>;
    using RankingSelector =
        std::conditional_t<RANKING == Ranking::kANY, WarpSelector<T, TOKENS, RING, MOMENTS>,
                           SixteenSelector>;
    using Selector =
        std::conditional_t<RANKING == Ranking::kNONE, NonZeroSelector<T, RING>, RankingSelector>;
    static_assert(RANKING != Ranking::kNONE || (TOKENS == 1 && !MOMENTS));
    static_assert(sizeof(Scratch) >= sizeof(float) * TOKENS * COLUMNS,
                  "partial sums reuse a warp's scratch");
    static_assert(sizeof(Scratch) == warpScratchBytes(TOKENS, BATCH) &&
                      sizeof(Moments) == kMOMENTS_BYTES,
                  "the host's arithmetic is that of the kernel");
};

//! eta[token] = mean of the token's K activations, by every CTA for itself, in a fixed order.
template <typename Shape>
__device__ void meanOfTokens(LinearArgs const& args, DecodeShared<Shape> const& shared) {
    using T = typename Shape::Element;
    int const warp = threadIdx.x / kWARP;
    int const lane = threadIdx.x % kWARP;
    for (int token = 0; token < Shape::TOKENS; ++token) {
        T const* const x =
            static_cast<T const*>(args.x) + static_cast<int64_t>(token) * args.channels;
        float sum = 0.0F;
#pragma unroll 8
        for (int32_t channel = threadIdx.x; channel < args.channels; channel += Shape::THREADS) {
            sum += loadActivation(x + channel);
        }
#pragma unroll
        for (int offset = 16; offset > 0; offset /= 2) {
            sum += __shfl_xor_sync(kWHOLE_WARP, sum, offset);
        }
        if (lane == 0) {
            shared.warpMeans[warp * Shape::TOKENS + token] = sum;
        }
    }
    __syncthreads();
    if (threadIdx.x < Shape::TOKENS) {
        float sum = 0.0F;
        for (int w = 0; w < Shape::WARPS; ++w) {
            sum += shared.warpMeans[w * Shape::TOKENS + threadIdx.x];
        }
        shared.eta[threadIdx.x] = sum / static_cast<float>(args.channels);
    }
    __syncthreads();
}

//! One vector of a row; single elements where rows are unaligned or the vector passes the last
//! column.
template <typename Shape>
__device__ __forceinline__ uint4 loadRowVector(typename Shape::Element const* address,
                                               int32_t column, int32_t outputs) {
    if constexpr (Shape::ALIGNED) {
        return loadStreaming(address);
    } else {
        using T = typename Shape::Element;
        union {
            uint4 raw;
            unsigned char bytes[16];
        } vector;
        vector.raw = make_uint4(0, 0, 0, 0);
        T elements[kVECTOR<T>];
        memcpy(elements, &vector.raw, sizeof(elements));
#pragma unroll
        for (int i = 0; i < kVECTOR<T>; ++i) {
            if (column + i < outputs) {
                elements[i] = address[i];
            }
        }
        memcpy(&vector.raw, elements, sizeof(elements));
        return vector.raw;
    }
}

//! Where a lane reads in every row.
template <typename Shape>
struct LaneColumns {
    typename Shape::Element const* w;  //!< W + column
    int32_t column;                    //!< first column of the lane's first vector
    int32_t outputs;
};

//! Issues the row loads of one batch: UNROLL independent vectors per lane.
template <typename Shape, bool WHOLE>
__device__ __forceinline__ void loadBatch(uint4 (&raw)[Shape::UNROLL],
                                          typename Shape::Scratch const& scratch,
                                          LaneColumns<Shape> const& lane, uint32_t head,
                                          uint32_t count) {
    uint32_t const slot = threadIdx.x % kWARP / Shape::LANES_PER_ROW;
#pragma unroll
    for (int load = 0; load < Shape::ROW_LOADS; ++load) {
        uint32_t const entry = load * Shape::ROWS_PER_LOAD + slot;
        bool const isThere = WHOLE || entry < count;
        int64_t const row = isThere ? scratch.queue[(head + entry) % Shape::RING].row : 0;
        typename Shape::Element const* const address = lane.w + row * lane.outputs;
#pragma unroll
        for (int v = 0; v < Shape::VECTORS; ++v) {
            uint4& target = raw[load * Shape::VECTORS + v];
            target = make_uint4(0, 0, 0, 0);
            if (isThere) {
                // A vector past the last column reads the lane's first one again; its sums are not
                // stored.
                int32_t const offset =
                    lane.column + v * Shape::STRIPE < lane.outputs ? v * Shape::STRIPE : 0;
                target = loadRowVector<Shape>(address + offset, lane.column + offset, lane.outputs);
            }
        }
    }
}

//! accumulator[token][i] += value * weight over one loaded batch.
template <typename Shape, bool WHOLE>
__device__ __forceinline__ void multiplyBatch(float (&accumulator)[Shape::TOKENS][Shape::WIDTH],
                                              uint4 const (&raw)[Shape::UNROLL],
                                              typename Shape::Scratch const& scratch, uint32_t head,
                                              uint32_t count) {
    using T = typename Shape::Element;
    uint32_t const slot = threadIdx.x % kWARP / Shape::LANES_PER_ROW;
#pragma unroll
    for (int load = 0; load < Shape::ROW_LOADS; ++load) {
        uint32_t const entry = load * Shape::ROWS_PER_LOAD + slot;
        bool const isThere = WHOLE || entry < count;
        float value[Shape::TOKENS];
#pragma unroll
        for (int token = 0; token < Shape::TOKENS; ++token) {
            value[token] =
                isThere ? scratch.queue[(head + entry) % Shape::RING].value[token] : 0.0F;
        }
#pragma unroll
        for (int v = 0; v < Shape::VECTORS; ++v) {
            Unpacked<T> const weights =
                unpack(raw[load * Shape::VECTORS + v], static_cast<T const*>(nullptr));
#pragma unroll
            for (int token = 0; token < Shape::TOKENS; ++token) {
#pragma unroll
                for (int i = 0; i < kVECTOR<T>; ++i) {
                    float& sum = accumulator[token][v * kVECTOR<T> + i];
                    sum = fmaf(value[token], weights.value[i], sum);
                }
            }
        }
    }
}

//! The warp's whole slice; with OVERLAP the next batch is ranked while one is in flight.
template <typename Shape>
__device__ __forceinline__ void streamRows(float (&accumulator)[Shape::TOKENS][Shape::WIDTH],
                                           typename Shape::Selector& selector,
                                           typename Shape::Scratch const& scratch,
                                           LaneColumns<Shape> const& lane) {
    uint4 raw[Shape::UNROLL];
    selector.fill(Shape::BATCH);
    while (selector.tail - selector.head >= Shape::BATCH) {
        uint32_t const head = selector.head;
        loadBatch<Shape, true>(raw, scratch, lane, head, Shape::BATCH);
        selector.head += Shape::BATCH;
        if constexpr (Shape::OVERLAP) {
            selector.fill(Shape::BATCH);
        }
        multiplyBatch<Shape, true>(accumulator, raw, scratch, head, Shape::BATCH);
        if constexpr (!Shape::OVERLAP) {
            selector.fill(Shape::BATCH);
        }
    }
    uint32_t const rest = selector.tail - selector.head;
    if (rest > 0) {
        loadBatch<Shape, false>(raw, scratch, lane, selector.head, rest);
        multiplyBatch<Shape, false>(accumulator, raw, scratch, selector.head, rest);
    }
}

//! Adds the lanes that share columns, then leaves the warp's sums [TOKENS][COLUMNS] in its scratch.
template <typename Shape>
__device__ __forceinline__ void storeWarpSums(float (&accumulator)[Shape::TOKENS][Shape::WIDTH],
                                              typename Shape::Scratch* scratch) {
    constexpr int kVALUES = kVECTOR<typename Shape::Element>;
    int const lane = threadIdx.x % kWARP;
    float* const sums = reinterpret_cast<float*>(scratch);
#pragma unroll
    for (int token = 0; token < Shape::TOKENS; ++token) {
#pragma unroll
        for (int i = 0; i < Shape::WIDTH; ++i) {
#pragma unroll
            for (int offset = 16; offset >= Shape::LANES_PER_ROW; offset /= 2) {
                accumulator[token][i] +=
                    __shfl_xor_sync(kWHOLE_WARP, accumulator[token][i], offset);
            }
        }
    }
    __syncwarp();  // every lane is done with the queue
    if (lane < Shape::LANES_PER_ROW) {
#pragma unroll
        for (int token = 0; token < Shape::TOKENS; ++token) {
#pragma unroll
            for (int i = 0; i < Shape::WIDTH; i += 4) {
                int const column = i / kVALUES * Shape::STRIPE + lane * kVALUES + i % kVALUES;
                float4 const four =
                    make_float4(accumulator[token][i], accumulator[token][i + 1],
                                accumulator[token][i + 2], accumulator[token][i + 3]);
                *reinterpret_cast<float4*>(sums + token * Shape::COLUMNS + column) = four;
            }
        }
    }
}

//! Rank 0: adds the ranks in order, corrects, rounds once, stores.
template <typename Shape>
__device__ __forceinline__ void storeOutputs(LinearArgs const& args,
                                             DecodeShared<Shape> const& shared, int32_t firstColumn,
                                             int cluster) {
    using T = typename Shape::Element;
    constexpr int kVALUES = Shape::TOKENS * Shape::COLUMNS;
    for (int index = threadIdx.x; index < kVALUES; index += Shape::THREADS) {
        int const token = index / Shape::COLUMNS;
        int32_t const column = firstColumn + index % Shape::COLUMNS;
        if (column >= args.outputs) {
            continue;
        }
        float sum = sumOverRanks(shared, index, cluster);
        if constexpr (Shape::MOMENTS) {
            Moments total;
            for (int rank = 0; rank < cluster; ++rank) {
                total.addMoments(shared.rankMoments[rank * Shape::TOKENS + token]);
            }
            sum *= args.selection.varianceCorrection ? total.correction(args.channels) : 1.0F;
        }
        storeOutput<T>(args, token, column, sum,
                       args.selection.dynamicShift ? shared.eta[token] : 0.0F);
    }
}

//! Brings what the kernel needs at once after the wait, and at its end, near beforehand: the
//! launch's parameters into the constant cache, the translations of the pages of x, y and W. The
//! value read from x may be stale; it is dropped. Where every row is kept, the first ones are known
//! now, and the memory is idle.
template <typename Shape>
__device__ __forceinline__ void touchAhead(LinearArgs const& args,
                                           LaneColumns<Shape> const& columns, Range slice) {
    asm volatile("" ::"l"(args.y), "r"(args.selection.n));  // one of each 64-byte line
    if (threadIdx.x < kWARP) {
        prefetchToL2(static_cast<typename Shape::Element const*>(args.x) + threadIdx.x);
        prefetchToL2(columns.w);
    }
    if (Shape::RANKING == Ranking::kNONE || args.selection.n < args.selection.m) {
        return;
    }
    int32_t const slot = static_cast<int32_t>(threadIdx.x % kWARP) / Shape::LANES_PER_ROW;
#pragma unroll
    for (int load = 0; load < Shape::ROW_LOADS; ++load) {
        int32_t const row = slice.begin + load * Shape::ROWS_PER_LOAD + slot;
        if (row < slice.end) {
            prefetchToL2(columns.w + static_cast<int64_t>(row) * columns.outputs);
        }
    }
}

//! grid.x = tiles * cluster; the cluster's ranks are neighbours in x. A shape of one token may run
//! several, as blockIdx.y: rows that two of them keep then come from memory once and from the
//! second-level cache after, and each token gets the bits that it gets alone.
template <typename Shape, int MIN_CTAS>
__global__ void __launch_bounds__(Shape::THREADS, MIN_CTAS)
    decodeKernel(LinearArgs const given, bool const allowsNextLate) {
    using T = typename Shape::Element;
    LinearArgs args = given;
    if constexpr (Shape::TOKENS == 1) {
        int64_t const token = blockIdx.y;
        args.x = static_cast<T const*>(given.x) + token * given.channels;
        args.y = static_cast<T*>(given.y) + token * given.outputs;
    }
    extern __shared__ __align__(16) unsigned char sharedBytes[];
    if (!allowsNextLate) {
        allowDependentLaunch();
    }
    int const cluster = static_cast<int>(clusterSize());
    uint32_t const rank = clusterRank();
    DecodeShared<Shape> const shared(sharedBytes, cluster);
    if (cluster > 1) {
        openMailbox(shared.mailbox, rank);
    }
    int const warp = threadIdx.x / kWARP;
    int const lane = threadIdx.x % kWARP;
    int32_t const firstColumn = static_cast<int32_t>(blockIdx.x / cluster) * Shape::COLUMNS;
    int32_t const column = firstColumn + lane % Shape::LANES_PER_ROW * kVECTOR<T>;
    // A lane past the last column reads the first vector of its tile again and its sums are not
    // stored.
    int32_t const readColumn = column < args.outputs ? column : firstColumn;
    LaneColumns<Shape> const columns{static_cast<T const*>(args.w) + readColumn, readColumn,
                                     args.outputs};

    // Units of the split: single groups of 16, or chunks of whole groups.
    int32_t const width = Shape::RANKING == Ranking::kANY ? chunkWidth(args.selection.m) : 16;
    Range const units = splitRange(ceilDivide(args.channels, width), cluster * Shape::WARPS,
                                   static_cast<int32_t>(rank) * Shape::WARPS + warp);
    Range const slice{min(units.begin * width, args.channels),
                      min(units.end * width, args.channels)};
    typename Shape::Selector selector(shared.scratch + warp, args.selection,
                                      static_cast<T const*>(args.x), args.channels, slice,
                                      shared.eta);
    selector.prepare();

    touchAhead<Shape>(args, columns, slice);
    waitForPredecessors();
    if (args.selection.dynamicShift) {
        meanOfTokens<Shape>(args, shared);
    }
    selector.begin();
    float accumulator[Shape::TOKENS][Shape::WIDTH] = {};
    streamRows<Shape>(accumulator, selector, shared.scratch[warp], columns);
    if (allowsNextLate) {
        allowDependentLaunch();
    }

    storeWarpSums<Shape>(accumulator, shared.scratch + warp);
    if constexpr (Shape::MOMENTS) {
#pragma unroll
        for (int token = 0; token < Shape::TOKENS; ++token) {
            selector.moments[token].reduceOverWarp();
            if (lane == 0) {
                shared.warpMoments[warp * Shape::TOKENS + token] = selector.moments[token];
            }
        }
    }
    if (gatherSums<Shape>(shared, rank, cluster)) {
        storeOutputs<Shape>(args, shared, firstColumn, cluster);
    }
}

template <typename Shape, int MIN_CTAS>
cudaError_t launchDecodeShape(LinearArgs const& args, DecodePlan const& plan,
                              DeviceTraits const& device, cudaStream_t stream) {
    return launchTiles<Shape, LinearArgs>(&decodeKernel<Shape, MIN_CTAS>, args, args.outputs,
                                          Shape::TOKENS == 1 ? args.tokens : 1, plan, device,
                                          stream);
}

}  // namespace nmexport::cuda
