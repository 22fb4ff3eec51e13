// Which kernel makes a row, by how many there are.
#include <algorithm>
#include <type_traits>

#include "gated_kernels.cuh"
#include "norm_kernels.cuh"
#include "prune_kernels.cuh"

namespace nmexport::cuda {
namespace {

using namespace between;

//! How a kernel is launched.
struct Grid {
    dim3 blocks;
    int threads{kTHREADS};
    size_t sharedBytes{0};
};

//! Launches a kernel that may start before the one ahead of it has ended.
template <typename... Parameters, typename... Given>
cudaError_t launchInChain(void (*kernel)(Parameters...), Grid const& grid,
                          DeviceTraits const& device, cudaStream_t stream, Given... given) {
    cudaError_t const raised = allowSharedBytes(kernel, grid.sharedBytes);
    if (raised != cudaSuccess) {
        return raised;
    }
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid.blocks;
    config.blockDim = dim3(static_cast<unsigned>(grid.threads));
    config.dynamicSmemBytes = grid.sharedBytes;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = device.computeCapability >= 90 ? 1U : 0U;
    return cudaLaunchKernelEx(&config, kernel, given...);
}

bool isBare(Selection const& selection) {
    return selection.scoreScale == nullptr && selection.valueScale == nullptr &&
           selection.shift == nullptr;
}

//! Nothing is dropped or changed: rows are gathered at most.
bool isWhole(Selection const& selection) {
    return selection.n == selection.m && selection.valueScale == nullptr &&
           selection.shift == nullptr;
}

//! True if the row is written unchanged.
bool isUntouched(Selection const& selection) {
    return isWhole(selection) && selection.channelOrder == nullptr;
}

//! As many blocks as are resident, where each takes row after row and reads its constants once.
unsigned residentBlocks(int64_t tokens, int threads, DeviceTraits const& device) {
    int64_t const blocks = static_cast<int64_t>(device.multiprocessors) * 2 * kMANY_THREADS;
    return static_cast<unsigned>(std::min(tokens, blocks / threads));
}

template <typename T, typename PRUNER, int THREADS>
cudaError_t enqueueNormRows(NormArgs const& args, DeviceTraits const& device, cudaStream_t stream) {
    Grid const grid{dim3(residentBlocks(args.tokens, THREADS, device)), THREADS,
                    sizeof(NextRow<THREADS>) + sizeof(uint4) * THREADS * kOCTETS};
    return launchInChain(normRowsKernel<T, THREADS, PRUNER>, grid, device, stream, args);
}

template <typename T, Pruner PRUNER>
cudaError_t enqueuePrunedNorm(NormArgs const& args, DeviceTraits const& device,
                              cudaStream_t stream) {
    using RowPruner = std::conditional_t<PRUNER == Pruner::kGATHER, WholeGroup<T>, RankedGroup<T>>;
    if (args.tokens > device.multiprocessors && args.channels <= kMANY_THREADS * kGROUP) {
        return enqueueNormRows<T, RowPruner, kMANY_THREADS>(args, device, stream);
    }
    if (args.tokens > device.multiprocessors && args.channels <= kTHREADS * kGROUP) {
        return enqueueNormRows<T, RowPruner, kTHREADS>(args, device, stream);
    }
    Grid grid{dim3(static_cast<unsigned>(args.tokens)), kTHREADS,
              stagedBytes(PRUNER, args.channels)};
    if (args.channels > kTHREADS * kELEMENTS) {
        return launchInChain(normKernel<T, PRUNER, 4>, grid, device, stream, args);
    }
    if (args.tokens > kFEW_TOKENS) {
        return launchInChain(normKernel<T, PRUNER, 1>, grid, device, stream, args);
    }
    // Some multiprocessors make the same norm, and each ranks a part of it.
    grid.blocks.y = static_cast<unsigned>(ceilDivide(args.channels, 2 * kTHREADS));
    return launchInChain(normKernel<T, PRUNER, 1, 1>, grid, device, stream, args);
}

template <typename T>
cudaError_t enqueueNorm(NormArgs const& args, DeviceTraits const& device, cudaStream_t stream) {
    if constexpr (sizeof(T) == 2) {
        if (args.isPruned && isWhole(args.selection)) {
            return enqueuePrunedNorm<T, Pruner::kGATHER>(args, device, stream);
        }
        if (args.isPruned) {
            return isBare(args.selection)
                       ? enqueuePrunedNorm<T, Pruner::kPACKED>(args, device, stream)
                       : enqueuePrunedNorm<T, Pruner::kWIDE>(args, device, stream);
        }
    }
    Grid const grid{dim3(static_cast<unsigned>(args.tokens))};
    return args.channels <= kTHREADS * kELEMENTS
               ? launchInChain(normKernel<T, Pruner::kNONE, 1>, grid, device, stream, args)
               : launchInChain(normKernel<T, Pruner::kNONE, 4>, grid, device, stream, args);
}

template <typename T>
cudaError_t enqueueGated(GatedSiluArgs const& args, DeviceTraits const& device,
                         cudaStream_t stream) {
    int64_t const pieces = args.tokens * (args.channels / kELEMENTS);
    Grid const grid{dim3(static_cast<unsigned>((pieces + kTHREADS - 1) / kTHREADS))};
    return launchInChain(gatedSiluKernel<T>, grid, device, stream, args, pieces);
}

//! Rows that a block takes: as many as leave it a part of the GPU, and of shared memory.
int32_t rowsTogether(int64_t tokens, size_t rowBytes, DeviceTraits const& device) {
    constexpr size_t kMOST_BYTES = size_t{64} << 10;
    int64_t const perBlock = tokens / device.multiprocessors;
    int64_t const fitting = std::max<int64_t>(1, static_cast<int64_t>(kMOST_BYTES / rowBytes));
    return static_cast<int32_t>(std::clamp<int64_t>(perBlock, 1, std::min<int64_t>(4, fitting)));
}

//! 8 of 16 by bare magnitude.
bool isHalfBare(Selection const& selection) {
    return isBare(selection) && selection.n == 8;
}

template <typename T, typename PRUNER>
cudaError_t enqueueGatedGroups(GatedSiluArgs const& args, DeviceTraits const& device,
                               cudaStream_t stream) {
    // Two at least where two are ranked at once.
    int32_t const rows = args.tokens > 2 * device.multiprocessors ? 4 : PRUNER::ROWS;
    int32_t const slabs = static_cast<int32_t>((args.tokens + rows - 1) / rows);
    Grid const grid{dim3(static_cast<unsigned>(ceilDivide(args.channels / kGROUP, kGROUP_THREADS)),
                         static_cast<unsigned>(slabs)),
                    kGROUP_THREADS};
    return launchInChain(gatedGroupKernel<T, PRUNER>, grid, device, stream, args, rows);
}

template <typename T, typename PRUNER>
cudaError_t enqueueGatedRows(GatedSiluArgs const& args, DeviceTraits const& device,
                             cudaStream_t stream) {
    size_t const rowBytes = sizeof(T) * static_cast<size_t>(args.channels);
    int32_t const rows = rowsTogether(args.tokens, rowBytes, device);
    Grid const grid{dim3(static_cast<unsigned>((args.tokens + rows - 1) / rows)), kMANY_THREADS,
                    rowBytes * static_cast<size_t>(rows)};
    return launchInChain(gatedRowsKernel<T, PRUNER>, grid, device, stream, args, rows);
}

template <typename T, typename PRUNER, int THREADS>
cudaError_t enqueuePruneRows(MaskArgs const& args, DeviceTraits const& device,
                             cudaStream_t stream) {
    Grid const grid{dim3(residentBlocks(args.tokens, THREADS, device)), THREADS};
    return launchInChain(pruneRowsKernel<T, THREADS, PRUNER>, grid, device, stream, args);
}

template <typename T, typename PRUNER>
cudaError_t enqueuePruneRows(MaskArgs const& args, DeviceTraits const& device,
                             cudaStream_t stream) {
    return args.channels <= kMANY_THREADS * kGROUP
               ? enqueuePruneRows<T, PRUNER, kMANY_THREADS>(args, device, stream)
               : enqueuePruneRows<T, PRUNER, kTHREADS>(args, device, stream);
}

//! A lane for each two positions of each token.
Grid gridOfPairs(int32_t channels, int64_t tokens) {
    int32_t const blocks = ceilDivide(channels, 2 * kPAIR_THREADS);
    return {dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(tokens)), kPAIR_THREADS};
}

template <typename T>
cudaError_t enqueuePrune(MaskArgs const& args, DeviceTraits const& device, cudaStream_t stream) {
    if (args.tokens > kFEW_TOKENS) {
        return isWhole(args.selection) ? enqueuePruneRows<T, WholeGroup<T>>(args, device, stream)
                                       : enqueuePruneRows<T, RankedGroup<T>>(args, device, stream);
    }
    Grid const grid = gridOfPairs(args.channels, args.tokens);
    return isBare(args.selection)
               ? launchInChain(prunePairKernel<T, true>, grid, device, stream, args)
               : launchInChain(prunePairKernel<T, false>, grid, device, stream, args);
}

template <typename T>
cudaError_t enqueuePrunedGated(GatedSiluArgs const& args, DeviceTraits const& device,
                               cudaStream_t stream) {
    if (args.tokens <= kFEW_TOKENS) {
        Grid const grid = gridOfPairs(args.channels, args.tokens);
        return isBare(args.selection)
                   ? launchInChain(gatedPairKernel<T, true>, grid, device, stream, args)
                   : launchInChain(gatedPairKernel<T, false>, grid, device, stream, args);
    }
    if (args.selection.channelOrder == nullptr) {
        return isHalfBare(args.selection)
                   ? enqueueGatedGroups<T, HalfBareGroup<T>>(args, device, stream)
                   : enqueueGatedGroups<T, RankedGroup<T>>(args, device, stream);
    }
    if (isWhole(args.selection)) {
        return enqueueGatedRows<T, WholeGroup<T>>(args, device, stream);
    }
    return isHalfBare(args.selection) ? enqueueGatedRows<T, HalfBareGroup<T>>(args, device, stream)
                                      : enqueueGatedRows<T, RankedGroup<T>>(args, device, stream);
}

//! Whether a row can be written so.
template <typename Args>
bool fits(Args const& args) {
    return args.channels > 0 && args.channels % kELEMENTS == 0 && args.tokens >= 0 &&
           args.tokens <= 0x7fffffff &&
           (!args.isPruned || canPrune(args.type, args.channels, args.selection));
}

}  // namespace

bool canPrune(DType type, int32_t channels, Selection const& selection) {
    return type != DType::kFLOAT32 && selection.m == 16 && selection.n >= 1 && selection.n <= 16 &&
           channels % 16 == 0 && channels <= kMAX_PRUNED_CHANNELS && !selection.dynamicShift &&
           !selection.varianceCorrection &&
           (selection.shiftLength == 0 || selection.shiftLength == 1 ||
            selection.shiftLength == channels) &&
           (selection.shiftLength == 0) == (selection.shift == nullptr) &&
           hasAlignedConstants(selection);
}

bool canPruneInChain(MaskArgs const& args) {
    bool const isFew = args.tokens <= kFEW_TOKENS;
    bool const isAligned =
        (reinterpret_cast<uintptr_t>(args.x) | reinterpret_cast<uintptr_t>(args.s)) % 16 == 0;
    bool const isOrdered =
        args.selection.channelOrder != nullptr && args.channels <= kTHREADS * kGROUP;
    return (isFew || isOrdered) && args.isGathered && args.keep == nullptr && isAligned &&
           canPrune(args.type, args.channels, args.selection);
}

cudaError_t launchPrune(MaskArgs const& args, DeviceTraits const& device, cudaStream_t stream) {
    if (args.x == nullptr || args.s == nullptr || !canPruneInChain(args)) {
        return cudaErrorInvalidValue;
    }
    if (args.tokens == 0) {
        return cudaSuccess;
    }
    return args.type == DType::kFLOAT16 ? enqueuePrune<__half>(args, device, stream)
                                        : enqueuePrune<__nv_bfloat16>(args, device, stream);
}

cudaError_t launchNorm(NormArgs const& given, DeviceTraits const& device, cudaStream_t stream) {
    bool const isGiven = given.x != nullptr && given.y != nullptr && given.weight != nullptr;
    if (!isGiven || !fits(given)) {
        return cudaErrorInvalidValue;
    }
    if (given.tokens == 0) {
        return cudaSuccess;
    }
    NormArgs args = given;
    args.isPruned = given.isPruned && !isUntouched(given.selection);
    switch (args.type) {
        case DType::kFLOAT32:
            return enqueueNorm<float>(args, device, stream);
        case DType::kFLOAT16:
            return enqueueNorm<__half>(args, device, stream);
        case DType::kBFLOAT16:
            return enqueueNorm<__nv_bfloat16>(args, device, stream);
    }
    return cudaErrorInvalidValue;
}

cudaError_t launchGatedSilu(GatedSiluArgs const& given, DeviceTraits const& device,
                            cudaStream_t stream) {
    bool const isGiven = given.gate != nullptr && given.up != nullptr && given.y != nullptr &&
                         given.stride % kELEMENTS == 0;
    if (!isGiven || !fits(given)) {
        return cudaErrorInvalidValue;
    }
    if (given.tokens == 0) {
        return cudaSuccess;
    }
    GatedSiluArgs args = given;
    args.isPruned = given.isPruned && !isUntouched(given.selection);
    switch (args.type) {
        case DType::kFLOAT32:
            return enqueueGated<float>(args, device, stream);
        case DType::kFLOAT16:
            return args.isPruned ? enqueuePrunedGated<__half>(args, device, stream)
                                 : enqueueGated<__half>(args, device, stream);
        case DType::kBFLOAT16:
            return args.isPruned ? enqueuePrunedGated<__nv_bfloat16>(args, device, stream)
                                 : enqueueGated<__nv_bfloat16>(args, device, stream);
    }
    return cudaErrorInvalidValue;
}

}  // namespace nmexport::cuda
