// Every warp is on its own until the end: it loads tiles of 16 positions straight from global
// memory into the registers of tensor-core instructions, so nothing passes through shared memory
// and no barrier stands in the loop.
//
//   S [heads, 16 positions] = Q [heads, D] · K^T     rows of K: one per 4 lanes, 16 bytes each
//   O^T [D, heads]         += V^T · P^T              four positions per lane, paired by a permute
//
// The order of D inside an instruction is free as long as both operands share it, so a lane loads
// whole 16-byte chunks. Below, lane = 4 * g + t, and chunk c is elements 8 * c .. 8 * c + 7.
#include "attention_exchange.cuh"

namespace nmexport::cuda {
namespace {

using namespace attention;

//! CTAs with one tile in flight that share a multiprocessor's registers. Two of them fit where the
//! assembler needs no more than 128 a thread: for compute capability 9.0.
#if __CUDA_ARCH__ == 900
constexpr int kSHARERS = 2;
#else
constexpr int kSHARERS = 1;
#endif

//! grid (ranks, heads of keys, batch). DEPTH tiles of a warp are in flight: it sets how many CTAs a
//! multiprocessor holds, and no result.
template <typename T, int HEAD, bool WHOLE, int DEPTH>
__global__ void __launch_bounds__(kTHREADS, DEPTH == 1 ? kSHARERS : 1)
    attentionKernel(AttentionArgs const args, int const group, int32_t const older,
                    float const scoreScale, bool const allowsNextLate) {
#if __CUDA_ARCH__ >= 900
    extern __shared__ __align__(16) unsigned char sharedBytes[];
    if (!allowsNextLate) {  // late is when this CTA ends
        allowDependentLaunch();
    }
    uint32_t const rank = clusterRank();
    openMailbox(reinterpret_cast<uint64_t*>(sharedBytes), rank);
    int const warp = threadIdx.x / kWARP_SIZE;
    int const lane = threadIdx.x % kWARP_SIZE;
    int const g = lane / 4;
    int const t = lane % 4;
    int const sequence = blockIdx.z;
    int const kvHead = blockIdx.y;

    // What no kernel of this step writes comes while the one before still runs.
    int32_t const last = min(max(args.lastPositions[sequence], 0), args.capacity - 1);
    int64_t const cache =
        static_cast<int64_t>(sequence * args.kvHeads + kvHead) * args.capacity * HEAD;
    OldRows<T, HEAD> const rows{static_cast<T*>(args.keys) + cache + g * HEAD + t * kCHUNK,
                                static_cast<T*>(args.values) + cache + 2 * t * HEAD + g * kCHUNK,
                                last, older};
    int32_t const slot = warp * kRANKS + static_cast<int>(rank);       // short texts use all ranks
    int32_t position = (max(last - older, 0) / kTILE + slot) * kTILE;  // of the tile at hand
    // Registers that turning queries takes are not there for values: they come as far as the L2.
    constexpr bool loadsValuesAhead = HEAD == 64 || DEPTH > 1;
    Tile<T, HEAD> tiles[DEPTH];
#pragma unroll
    for (int d = 0; d < DEPTH; ++d) {
        tiles[d].loadKeys(rows, position + d * kSTEP, g);
        if (loadsValuesAhead) {
            tiles[d].loadValues(rows, position + d * kSTEP, t);
        } else {
            prefetchValues(rows, position + d * kSTEP, lane);
        }
    }
    Turn<T, HEAD, WHOLE> turn;
    turn.load(args, last, t);

    waitForPredecessors();
    LaneQuery<HEAD> const laneQuery{
        sharedAddress(Exchange<HEAD>(sharedBytes, group).sumsOf(warp)) + 16 * lane, 64U * group,
        g < group};
    uint4 turned[HEAD / 32];
    turn.apply(
        turned, g < group,
        static_cast<T const*>(args.q) + sequence * args.queryStride + (kvHead * group + g) * HEAD,
        t);
    laneQuery.store(turned);
    Softmax<T, HEAD> softmax;
    if (slot == kSLOTS - 1) {  // the warp with the fewest tiles
        int64_t const from = sequence * args.keyStride + kvHead * HEAD;
        uint4 values[HEAD / 64];
#pragma unroll
        for (int m = 0; m < HEAD / 64; ++m) {
            values[m] = loadActivationsWhere(
                true, static_cast<T const*>(args.v) + from + (g + 8 * m) * kCHUNK);
        }
        turn.apply(turned, true, static_cast<T const*>(args.k) + from, t);
        int64_t const row = static_cast<int64_t>(last) * HEAD;
        if (g == 0) {
#pragma unroll
            for (int i = 0; i < HEAD / 32; ++i) {
                *reinterpret_cast<uint4*>(rows.keys + row + 4 * i * kCHUNK) = turned[i];
            }
        }
        if (t == 0) {
#pragma unroll
            for (int m = 0; m < HEAD / 64; ++m) {
                *reinterpret_cast<uint4*>(rows.values + row + 8 * m * kCHUNK) = values[m];
            }
        }
        softmax.begin(scoreNewKey<T, HEAD>(laneQuery, turned) * scoreScale, values, t);
    } else {
        softmax.clear();
    }
    if (!loadsValuesAhead) {  // DEPTH is 1
        tiles[0].loadValues(rows, position, t);
    }

    while (position < rows.end) {
#pragma unroll
        for (int d = 0; d < DEPTH; ++d) {
            if (position >= rows.end) {
                break;
            }
            int32_t const next = position + DEPTH * kSTEP;
            float scores[4];
            scoreTile<T, HEAD>(scores, laneQuery, tiles[d]);
            tiles[d].loadKeys(rows, next, g);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                bool const isThere = rows.has(position + 8 * (i / 2) + 2 * t + i % 2);
                scores[i] = isThere ? scores[i] * scoreScale : lowest();
            }
            softmax.weigh(scores, t);
            softmax.add(tiles[d], scores);
            tiles[d].loadValues(rows, next, t);
            position += kSTEP;
        }
    }

    Exchange<HEAD> const exchange(sharedBytes, group);
    __syncwarp();  // sums take the place of queries
    storeWarp<T, HEAD>(exchange, softmax, warp, g, t);
    __syncthreads();
    if (rank == 0 && threadIdx.x == 0) {
        expectMail(exchange.mailbox, exchange.mailBytes());
    }
    __syncwarp();
    waitForOpenMailbox();
    sendSums<HEAD>(exchange, rank);
    if (rank == 0) {
        waitForMail(exchange.mailbox);
        storeResult<T, HEAD>(
            exchange, static_cast<T*>(args.y) +
                          static_cast<int64_t>(sequence * args.kvHeads + kvHead) * group * HEAD);
    }
#endif
}

template <typename T, int HEAD, bool WHOLE, int DEPTH>
cudaError_t launchShape(AttentionArgs const& args, bool allowsNextLate, cudaStream_t stream) {
    auto* const kernel = &attentionKernel<T, HEAD, WHOLE, DEPTH>;
    int const group = args.heads / args.kvHeads;
    int32_t const older = args.window > 0 ? args.window - 1 : args.capacity;
    size_t const sharedBytes = Exchange<HEAD>::bytes(group);
    if (sharedBytes > 48 * 1024) {
        cudaError_t const raised = cudaFuncSetAttribute(
            kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(sharedBytes));
        if (raised != cudaSuccess) {
            return raised;
        }
    }
    cudaLaunchAttribute attributes[2] = {};
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim.x = kRANKS;
    attributes[1].val.clusterDim.y = 1;
    attributes[1].val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim =
        dim3(kRANKS, static_cast<unsigned>(args.kvHeads), static_cast<unsigned>(args.batch));
    config.blockDim = dim3(kTHREADS);
    config.dynamicSmemBytes = sharedBytes;
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = 2;
    return cudaLaunchKernelEx(&config, kernel, args, group, older, args.scale * kLOG2_E,
                              allowsNextLate);
}

template <typename T, int HEAD, bool WHOLE>
cudaError_t launchDepth(AttentionArgs const& args, AttentionPlan const& plan, cudaStream_t stream) {
    bool const isLate = plan.allowsNextLate != 0;
    return plan.depth == 1 ? launchShape<T, HEAD, WHOLE, 1>(args, isLate, stream)
                           : launchShape<T, HEAD, WHOLE, 2>(args, isLate, stream);
}

template <typename T, int HEAD>
cudaError_t launchTurn(AttentionArgs const& args, AttentionPlan const& plan, cudaStream_t stream) {
    return args.rotary == HEAD ? launchDepth<T, HEAD, true>(args, plan, stream)
                               : launchDepth<T, HEAD, false>(args, plan, stream);
}

template <typename T>
cudaError_t launchType(AttentionArgs const& args, AttentionPlan const& plan, cudaStream_t stream) {
    return args.headSize == 64 ? launchTurn<T, 64>(args, plan, stream)
                               : launchTurn<T, 128>(args, plan, stream);
}

bool isAligned(void const* pointer) {
    return pointer != nullptr && reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

bool hasPointers(AttentionArgs const& args) {
    bool const hasTables = args.rotary == 0 || (isAligned(args.cosines) && isAligned(args.sines));
    return isAligned(args.q) && isAligned(args.k) && isAligned(args.v) && isAligned(args.keys) &&
           isAligned(args.values) && isAligned(args.y) && args.lastPositions != nullptr &&
           hasTables;
}

}  // namespace

bool attentionFits(AttentionArgs const& args, DeviceTraits const& device) {
    bool const isHalf = args.type == DType::kFLOAT16 || args.type == DType::kBFLOAT16;
    bool const hasHeads = args.kvHeads > 0 && args.heads > 0 && args.heads % args.kvHeads == 0 &&
                          args.heads / args.kvHeads <= kMOST_GROUP && args.kvHeads <= 0xffff;
    bool const hasRotary =
        args.rotary == 0 || (args.rotary > 0 && args.rotary % (2 * kCHUNK) == 0 &&
                             args.rotary <= args.headSize && args.positions > 0);
    return device.computeCapability >= 90 && isHalf && hasHeads && hasRotary &&
           (args.headSize == 64 || args.headSize == 128) && args.capacity > 0 && args.batch >= 0 &&
           args.batch <= 0xffff && args.queryStride % kCHUNK == 0 && args.keyStride % kCHUNK == 0;
}

cudaError_t launchAttention(AttentionArgs const& args, DeviceTraits const& device,
                            cudaStream_t stream) {
    return launchAttentionWithPlan(args, AttentionPlan{}, device, stream);
}

cudaError_t launchAttentionWithPlan(AttentionArgs const& args, AttentionPlan const& plan,
                                    DeviceTraits const& device, cudaStream_t stream) {
    if (!attentionFits(args, device) || plan.depth < 1 || plan.depth > 2) {
        return cudaErrorInvalidValue;
    }
    if (args.batch == 0) {
        return cudaSuccess;
    }
    if (!hasPointers(args)) {
        return cudaErrorInvalidValue;
    }
    return args.type == DType::kFLOAT16 ? launchType<__half>(args, plan, stream)
                                        : launchType<__nv_bfloat16>(args, plan, stream);
}

}  // namespace nmexport::cuda
