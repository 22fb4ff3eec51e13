// Which kernel makes a row, by how many there are.
#include "between_kernels.cuh"

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

template <typename T, Pruner PRUNER>
cudaError_t enqueuePrunedNorm(NormArgs const& args, DeviceTraits const& device,
                              cudaStream_t stream) {
    Grid grid{dim3(static_cast<unsigned>(args.tokens)), kTHREADS,
              stagedBytes(PRUNER, args.channels)};
    bool const isShort = args.channels <= kTHREADS * kELEMENTS;
    if (args.tokens <= kFEW_TOKENS && isShort) {
        // Some multiprocessors make the same norm, and each ranks a part of it.
        grid.blocks.y = static_cast<unsigned>(ceilDivide(args.channels, 2 * kTHREADS));
        return launchInChain(normKernel<T, PRUNER, 1, kTHREADS, 1>, grid, device, stream, args);
    }
    if (args.tokens > device.multiprocessors) {
        grid.threads = kMANY_THREADS;
        return launchInChain(normKernel<T, PRUNER, 2, kMANY_THREADS>, grid, device, stream, args);
    }
    return isShort ? launchInChain(normKernel<T, PRUNER, 1, kTHREADS>, grid, device, stream, args)
                   : launchInChain(normKernel<T, PRUNER, 4, kTHREADS>, grid, device, stream, args);
}

template <typename T>
cudaError_t enqueueNorm(NormArgs const& args, DeviceTraits const& device, cudaStream_t stream) {
    if constexpr (sizeof(T) == 2) {
        if (args.isPruned) {
            return isBare(args.selection)
                       ? enqueuePrunedNorm<T, Pruner::kPACKED>(args, device, stream)
                       : enqueuePrunedNorm<T, Pruner::kWIDE>(args, device, stream);
        }
    }
    Grid const grid{dim3(static_cast<unsigned>(args.tokens))};
    return args.channels <= kTHREADS * kELEMENTS
               ? launchInChain(normKernel<T, Pruner::kNONE, 1, kTHREADS>, grid, device, stream,
                               args)
               : launchInChain(normKernel<T, Pruner::kNONE, 4, kTHREADS>, grid, device, stream,
                               args);
}

template <typename T>
cudaError_t enqueueGated(GatedSiluArgs const& args, DeviceTraits const& device,
                         cudaStream_t stream) {
    int64_t const pieces = args.tokens * (args.channels / kELEMENTS);
    Grid const grid{dim3(static_cast<unsigned>((pieces + kTHREADS - 1) / kTHREADS))};
    return launchInChain(gatedSiluKernel<T>, grid, device, stream, args, pieces);
}

template <typename T, Pruner PRUNER, int THREADS>
cudaError_t enqueueGatedRows(GatedSiluArgs const& args, DeviceTraits const& device,
                             cudaStream_t stream) {
    Grid const grid{dim3(static_cast<unsigned>(args.tokens)), THREADS,
                    stagedBytes(PRUNER, args.channels)};
    return launchInChain(gatedRowKernel<T, PRUNER, THREADS>, grid, device, stream, args);
}

//! A lane for each two positions of each token.
Grid gridOfPairs(int32_t channels, int64_t tokens) {
    int32_t const blocks = ceilDivide(channels, 2 * kPAIR_THREADS);
    return {dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(tokens)), kPAIR_THREADS};
}

template <typename T>
cudaError_t enqueuePrune(MaskArgs const& args, DeviceTraits const& device, cudaStream_t stream) {
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
    bool const isMany = args.tokens > device.multiprocessors;
    if (!isBare(args.selection)) {
        return isMany ? enqueueGatedRows<T, Pruner::kWIDE, kMANY_THREADS>(args, device, stream)
                      : enqueueGatedRows<T, Pruner::kWIDE, kLONE_THREADS>(args, device, stream);
    }
    if (!isMany) {
        return enqueueGatedRows<T, Pruner::kPACKED, kLONE_THREADS>(args, device, stream);
    }
    bool const hasPairs = args.selection.n == 8 && args.channels % 32 == 0;
    return hasPairs ? enqueueGatedRows<T, Pruner::kPAIRS, kMANY_THREADS>(args, device, stream)
                    : enqueueGatedRows<T, Pruner::kPACKED, kMANY_THREADS>(args, device, stream);
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
           reinterpret_cast<uintptr_t>(selection.channelOrder) % sizeof(int2) == 0;
}

bool canPruneInChain(MaskArgs const& args) {
    return args.tokens <= kFEW_TOKENS && args.isGathered && args.keep == nullptr &&
           canPrune(args.type, args.channels, args.selection) &&
           reinterpret_cast<uintptr_t>(args.s) % sizeof(uint32_t) == 0;
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

cudaError_t launchNorm(NormArgs const& args, DeviceTraits const& device, cudaStream_t stream) {
    bool const isWhole = args.x != nullptr && args.y != nullptr && args.weight != nullptr;
    if (!isWhole || !fits(args)) {
        return cudaErrorInvalidValue;
    }
    if (args.tokens == 0) {
        return cudaSuccess;
    }
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

cudaError_t launchGatedSilu(GatedSiluArgs const& args, DeviceTraits const& device,
                            cudaStream_t stream) {
    bool const isWhole = args.gate != nullptr && args.up != nullptr && args.y != nullptr &&
                         args.stride % kELEMENTS == 0;
    if (!isWhole || !fits(args)) {
        return cudaErrorInvalidValue;
    }
    if (args.tokens == 0) {
        return cudaSuccess;
    }
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
