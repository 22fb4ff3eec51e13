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
// window. Sums then meet as decode_sums.cuh has it.
#pragma once

#include "decode_sums.cuh"
#include "stored_sums.cuh"
#include "tile_launch.cuh"

namespace nmexport::cuda {

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
