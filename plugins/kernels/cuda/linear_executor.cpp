#include "linear_executor.h"

#include <algorithm>

#include "between.h"
#include "cuda_fault.h"

namespace nmexport::cuda {

namespace {

constexpr std::size_t kALIGNMENT = 256;  // of cudaMalloc, which the kernels and cuBLASLt like best

std::size_t aligned(std::size_t bytes) {
    return (bytes + kALIGNMENT - 1) / kALIGNMENT * kALIGNMENT;
}

// A tile of widened weights, as measured on an H200 whose second-level cache holds 60 MB: larger
// ones come from memory again, and products of fewer columns leave multiprocessors idle.
constexpr std::int64_t kTILE_BYTES = std::int64_t{64} << 20;
constexpr std::int32_t kLEAST_COLUMNS = 4096;
constexpr std::int32_t kTILE_UNIT = 64;  // columns

// Bytes of a column of W in T, or of a token.
std::size_t columnBytes(const LinearWork& work) {
    return static_cast<std::size_t>(work.channels) * (work.type == DType::kFLOAT32 ? 4 : 2);
}

// Columns of W that are widened at a time.
std::int32_t tileColumns(const LinearWork& work) {
    const std::int64_t bytes = work.tileBytes > 0 ? work.tileBytes : kTILE_BYTES;
    const std::int32_t least = work.tileBytes > 0 ? kTILE_UNIT : kLEAST_COLUMNS;
    const auto units =
        static_cast<std::int32_t>(static_cast<std::size_t>(bytes) / columnBytes(work) / kTILE_UNIT);
    return std::min(std::max(units * kTILE_UNIT, least), work.outputs);
}

// Where the parts of the workspace lie:
//
//   | s [tokens, K] T | eta [tokens] | nu [tokens] | product [tokens, O] float32 | cuBLASLt's | W |
//
// s only where a mask kernel writes it, the product only where an epilogue reads it, a tile of W
// [K, columns] T only where it is stored otherwise.
struct Workspace {
    std::size_t eta;
    std::size_t nu;
    std::size_t product;
    std::size_t blas;
    std::size_t weights;
    std::size_t bytes;

    explicit Workspace(const LinearWork& work) {
        const std::size_t tokens = static_cast<std::size_t>(work.tokens);
        const std::size_t rowBytes = columnBytes(work);
        const std::size_t outputs = static_cast<std::size_t>(work.outputs);
        eta = aligned(work.needsMask ? tokens * rowBytes : 0);
        nu = eta + aligned(tokens * sizeof(float));
        product = nu + aligned(tokens * sizeof(float));
        blas = product + aligned(work.needsEpilogue ? tokens * outputs * sizeof(float) : 0);
        weights = blas + kPRODUCT_WORKSPACE_BYTES;
        const std::size_t tile = static_cast<std::size_t>(tileColumns(work)) * columnBytes(work);
        bytes = weights + (work.weights == WeightType::kT ? 0 : tile);
    }
};

template <typename T = void>
T* at(void* workspace, std::size_t offset) {
    return reinterpret_cast<T*>(static_cast<char*>(workspace) + offset);
}

bool takesDecodeKernel(const LinearWork& work, const DeviceTraits& device, LinearPath path) {
    if (path != LinearPath::kFASTER) return false;
    if (work.weights != WeightType::kT) {
        return work.hasStoredRows && work.tokens <= kMAX_STORED_TOKENS &&
               device.computeCapability >= kSTORED_CAPABILITY;
    }
    if (work.isPruned) return work.tokens <= kMAX_PRUNED_TOKENS;
    return work.tokens <= kMAX_DECODE_TOKENS &&
           decodeIsFaster(device, work.type, static_cast<std::int32_t>(work.tokens), work.channels,
                          work.outputs);
}

ProductShape productOf(const LinearWork& work) {
    return {work.type,    work.tokens,        work.channels,
            work.outputs, work.needsEpilogue, work.hasBias && !work.needsEpilogue};
}

// The product of a tile of widened columns.
ProductShape tileOf(const LinearWork& work, std::int32_t columns) {
    ProductShape shape = productOf(work);
    shape.outputs = columns;
    shape.resultStride = work.outputs;
    return shape;
}

// Where nothing is dropped, there is nothing to correct, not even for a constant token.
LinearArgs simplified(LinearArgs args) {
    if (args.selection.n == args.selection.m) args.selection.varianceCorrection = false;
    return args;
}

MaskArgs maskOf(const LinearArgs& args, void* s, float* eta, float* nu) {
    MaskArgs mask;
    mask.type = args.type;
    mask.tokens = args.tokens;
    mask.channels = args.channels;
    mask.selection = args.selection;
    mask.x = args.x;
    mask.isGathered = true;
    mask.s = s;
    mask.eta = args.selection.dynamicShift ? eta : nullptr;
    mask.nu = args.selection.varianceCorrection ? nu : nullptr;
    return mask;
}

void enqueueMask(const MaskArgs& mask, const DeviceTraits& device, cudaStream_t stream) {
    checkCuda(canPruneInChain(mask) ? launchPrune(mask, device, stream) : launchMask(mask, stream),
              "the mask kernel");
}

// Enqueues the pruning of x into the workspace; the linear that is left.
LinearArgs pruned(const LinearArgs& args, const DeviceTraits& device, void* workspace,
                  cudaStream_t stream) {
    checkCuda(launchPrune(maskOf(args, workspace, nullptr, nullptr), device, stream),
              "the pruning kernel");
    LinearArgs rest = args;
    rest.selection = Selection{};
    rest.selection.n = rest.selection.m;
    rest.isPruned = true;
    rest.x = workspace;
    return rest;
}

EpilogueArgs epilogueOf(const LinearArgs& args, const float* product, const float* eta,
                        const float* nu) {
    EpilogueArgs epilogue;
    epilogue.type = args.type;
    epilogue.tokens = args.tokens;
    epilogue.outputs = args.outputs;
    epilogue.product = product;
    epilogue.eta = args.selection.dynamicShift ? eta : nullptr;
    epilogue.nu = args.selection.varianceCorrection ? nu : nullptr;
    epilogue.shiftWeight = args.selection.dynamicShift ? args.shiftWeight : nullptr;
    epilogue.bias = args.bias;
    epilogue.y = args.y;
    return epilogue;
}

}  // namespace

LinearWork workOf(const LinearArgs& args) {
    const Selection selection = simplified(args).selection;
    LinearWork work;
    work.type = args.type;
    work.tokens = args.tokens;
    work.channels = args.channels;
    work.outputs = args.outputs;
    work.tileBytes = args.tileBytes;
    work.needsMask = selection.n < selection.m || selection.channelOrder != nullptr ||
                     selection.valueScale != nullptr || selection.shift != nullptr ||
                     selection.dynamicShift;
    work.isPruned = args.isPruned;
    work.weights = args.stored.type;
    work.hasStoredRows = hasStoredRows(args);
    work.prunesFirst = work.weights == WeightType::kT && args.tokens <= kMAX_PRUNED_TOKENS &&
                       selection.channelOrder != nullptr && selection.n < selection.m &&
                       canPrune(args.type, args.channels, selection);
    work.needsEpilogue = selection.dynamicShift || selection.varianceCorrection;
    work.hasBias = args.bias != nullptr;
    return work;
}

std::size_t workspaceBytes(const LinearWork& work, const DeviceTraits& device, LinearPath path) {
    if (!takesDecodeKernel(work, device, path)) return Workspace(work).bytes;
    if (work.weights != WeightType::kT) return work.needsMask ? Workspace(work).product : 0;
    return work.prunesFirst ? Workspace(work).eta : 0;
}

void LinearExecutor::prepare(const LinearWork& work, const DeviceTraits& device, LinearPath path) {
    if (work.tokens == 0 || takesDecodeKernel(work, device, path)) return;
    const std::lock_guard<std::mutex> lock(mMutex);
    if (work.weights == WeightType::kT) {
        mProduct.prepare(productOf(work));
        return;
    }
    const std::int32_t columns = tileColumns(work);
    mProduct.prepare(tileOf(work, columns));
    if (work.outputs % columns != 0) mProduct.prepare(tileOf(work, work.outputs % columns));
}

void LinearExecutor::run(const LinearArgs& given, const DeviceTraits& device, LinearPath path,
                         void* workspace, cudaStream_t stream) {
    if (given.tokens == 0) return;
    const LinearArgs args = simplified(given);
    const LinearWork work = workOf(args);
    if (!takesDecodeKernel(work, device, path)) {
        runProduct(args, device, workspace, stream);
    } else if (work.weights != WeightType::kT) {
        runStored(args, device, workspace, stream);
    } else {
        const LinearArgs few = work.prunesFirst ? pruned(args, device, workspace, stream) : args;
        checkCuda(launchDecode(few, device, stream), "the decode kernel");
    }
}

void LinearExecutor::runStored(const LinearArgs& args, const DeviceTraits& device, void* workspace,
                               cudaStream_t stream) {
    const LinearWork work = workOf(args);
    const Workspace parts(work);
    LinearArgs few = args;
    TokenCorrections corrections;
    if (work.needsMask) {
        const MaskArgs mask = maskOf(args, workspace, at<float>(workspace, parts.eta),
                                     at<float>(workspace, parts.nu));
        enqueueMask(mask, device, stream);
        few.x = workspace;
        corrections = {mask.eta, mask.nu};
    }
    checkCuda(launchStored(few, corrections, device, stream), "the decode kernel");
}

// The product of s and W, in T or float32 as the epilogue wants it.
void LinearExecutor::multiply(const LinearArgs& args, const void* s, void* product, void* workspace,
                              cudaStream_t stream) {
    const LinearWork work = workOf(args);
    const Workspace parts(work);
    void* const blas = at<>(workspace, parts.blas);
    const std::lock_guard<std::mutex> lock(mMutex);
    if (work.weights == WeightType::kT) {
        mProduct.enqueue(productOf(work), s, args.w, args.bias, product, blas, stream);
        return;
    }
    const std::size_t bytes = work.needsEpilogue || work.type == DType::kFLOAT32 ? 4 : 2;
    void* const widened = at<>(workspace, parts.weights);
    for (std::int32_t first = 0; first < work.outputs; first += tileColumns(work)) {
        const std::int32_t columns = std::min(tileColumns(work), work.outputs - first);
        checkCuda(launchWiden({args.type, args.channels, args.outputs, args.w, args.stored, first,
                               columns, widened},
                              stream),
                  "the kernel that widens weights");
        const std::size_t offset = static_cast<std::size_t>(first) * bytes;
        const void* const bias =
            args.bias == nullptr ? nullptr : static_cast<const char*>(args.bias) + offset;
        mProduct.enqueue(tileOf(work, columns), s, widened, bias, at<>(product, offset), blas,
                         stream);
    }
}

void LinearExecutor::runProduct(const LinearArgs& args, const DeviceTraits& device, void* workspace,
                                cudaStream_t stream) {
    const LinearWork work = workOf(args);
    const Workspace parts(work);
    float* const eta = at<float>(workspace, parts.eta);
    float* const nu = at<float>(workspace, parts.nu);
    const void* s = args.x;
    if (work.needsMask) {
        enqueueMask(maskOf(args, workspace, eta, nu), device, stream);
        s = workspace;
    }
    void* const product = work.needsEpilogue ? at<>(workspace, parts.product) : args.y;
    multiply(args, s, product, workspace, stream);
    if (!work.needsEpilogue) return;
    const EpilogueArgs epilogue = epilogueOf(args, static_cast<const float*>(product), eta, nu);
    checkCuda(launchEpilogue(epilogue, stream), "the epilogue kernel");
}

}  // namespace nmexport::cuda
