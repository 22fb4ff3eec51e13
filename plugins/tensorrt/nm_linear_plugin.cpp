#include "nm_linear_plugin.h"

namespace nmexport::trt {

namespace Input = NMLinearInput;

namespace {

constexpr std::size_t kALIGNMENT = 256;  // of cudaMalloc, which the kernels and cuBLASLt like best

std::size_t aligned(std::size_t bytes) {
    return (bytes + kALIGNMENT - 1) / kALIGNMENT * kALIGNMENT;
}

// Where the parts of the workspace lie:
//
//   | s [tokens, K] T | eta [tokens] | nu [tokens] | product [tokens, O] float32 | cuBLASLt's |
//
// The product only where an epilogue reads it: else it is y itself.
struct WorkspacePlan {
    std::size_t eta;
    std::size_t nu;
    std::size_t product;
    std::size_t blas;
    std::size_t bytes;

    explicit WorkspacePlan(const ProductShape& shape) {
        const auto count = static_cast<std::size_t>(shape.tokens);
        const auto outputs = static_cast<std::size_t>(shape.floatResult ? shape.outputs : 0);
        eta = aligned(count * static_cast<std::size_t>(shape.channels) * elementBytes(shape.type));
        nu = eta + aligned(count * sizeof(float));
        product = nu + aligned(count * sizeof(float));
        blas = product + aligned(count * outputs * sizeof(float));
        bytes = blas + kPRODUCT_WORKSPACE_BYTES;
    }
};

template <typename T = void>
T* at(void* workspace, std::size_t offset) {
    return reinterpret_cast<T*>(static_cast<char*>(workspace) + offset);
}

}  // namespace

std::size_t NmLinearPlugin::workspaceBytes(cuda::DType type, const Shape& x,
                                           std::int64_t outputs) const {
    return WorkspacePlan(productShape(type, x, outputs)).bytes;
}

std::vector<std::int32_t> NmLinearPlugin::tactics(std::int64_t minTokens) const {
    if (minTokens > cuda::kMAX_DECODE_TOKENS) return {kTACTIC_PRODUCT};
    return {kTACTIC_BY_TOKENS, kTACTIC_PRODUCT};
}

bool NmLinearPlugin::usesDecodeKernel(cuda::DType type, const Shape& x,
                                      std::int64_t outputs) const {
    const std::int64_t tokens = tokensOf(x);
    return tactic() != kTACTIC_PRODUCT && tokens <= cuda::kMAX_DECODE_TOKENS &&
           cuda::decodeIsFaster(device(), type, static_cast<std::int32_t>(tokens),
                                static_cast<std::int32_t>(x.back()),
                                static_cast<std::int32_t>(outputs));
}

bool NmLinearPlugin::needsEpilogue() const {
    return settings().dynamicShift || settings().varianceCorrection ||
           settings().tensorOf(Input::bias) >= 0;
}

ProductShape NmLinearPlugin::productShape(cuda::DType type, const Shape& x,
                                          std::int64_t outputs) const {
    return {type, tokensOf(x), x.back(), outputs, needsEpilogue()};
}

void NmLinearPlugin::prepare(cuda::DType type, const Shape& x, std::int64_t outputs) {
    if (tokensOf(x) == 0 || usesDecodeKernel(type, x, outputs)) return;
    mProduct.prepare(productShape(type, x, outputs));
}

void NmLinearPlugin::run(cuda::DType type, const Shape& x, std::int64_t outputs,
                         const Tensors& tensors, void* y, void* workspace, cudaStream_t stream) {
    if (usesDecodeKernel(type, x, outputs)) {
        runDecode(type, x, outputs, tensors, y, stream);
    } else {
        runProduct(type, x, outputs, tensors, y, workspace, stream);
    }
}

cuda::Selection NmLinearPlugin::selection(const Shape& x, const Tensors& tensors) const {
    cuda::Selection selection;
    // Keeping all m of m is the dense linear, with every constant where it belongs.
    selection.n = settings().sparsifies(sequenceOf(x)) ? settings().n : settings().m;
    selection.m = settings().m;
    selection.scoreScale = tensors.data<float>(Input::score_scale);
    selection.channelOrder = tensors.data<std::int32_t>(Input::channel_order);
    selection.shift = tensors.data<float>(Input::shift);
    selection.shiftLength = tensors.length(Input::shift);
    selection.dynamicShift = settings().dynamicShift;
    selection.varianceCorrection = settings().varianceCorrection;
    return selection;
}

void NmLinearPlugin::runDecode(cuda::DType type, const Shape& x, std::int64_t outputs,
                               const Tensors& tensors, void* y, cudaStream_t stream) const {
    cuda::DecodeArgs args;
    args.type = type;
    args.tokens = static_cast<std::int32_t>(tokensOf(x));
    args.channels = static_cast<std::int32_t>(x.back());
    args.outputs = static_cast<std::int32_t>(outputs);
    args.selection = selection(x, tensors);
    args.x = tensors.data(Input::X);
    args.w = tensors.data(Input::W);
    args.bias = tensors.data(Input::bias);
    args.shiftWeight = tensors.data<float>(Input::shift_weight);
    args.y = y;
    checkCuda(cuda::launchDecode(args, device(), stream), "the decode kernel");
}

void NmLinearPlugin::runProduct(cuda::DType type, const Shape& x, std::int64_t outputs,
                                const Tensors& tensors, void* y, void* workspace,
                                cudaStream_t stream) {
    const std::int64_t tokens = tokensOf(x);
    const ProductShape shape = productShape(type, x, outputs);
    const WorkspacePlan plan(shape);
    cuda::MaskArgs mask;
    mask.type = type;
    mask.tokens = tokens;
    mask.channels = static_cast<std::int32_t>(x.back());
    mask.selection = selection(x, tensors);
    mask.x = tensors.data(Input::X);
    mask.s = workspace;
    mask.eta = settings().dynamicShift ? at<float>(workspace, plan.eta) : nullptr;
    mask.nu = settings().varianceCorrection ? at<float>(workspace, plan.nu) : nullptr;
    checkCuda(cuda::launchMask(mask, stream), "the mask kernel");

    void* const product = needsEpilogue() ? at<>(workspace, plan.product) : y;
    mProduct.enqueue(shape, workspace, tensors.data(Input::W), product, at<>(workspace, plan.blas),
                     stream);
    if (!needsEpilogue()) return;

    cuda::EpilogueArgs epilogue;
    epilogue.type = type;
    epilogue.tokens = tokens;
    epilogue.outputs = static_cast<std::int32_t>(outputs);
    epilogue.product = static_cast<const float*>(product);
    epilogue.eta = mask.eta;
    epilogue.nu = mask.nu;
    epilogue.shiftWeight =
        settings().dynamicShift ? tensors.data<float>(Input::shift_weight) : nullptr;
    epilogue.bias = tensors.data(Input::bias);
    epilogue.y = y;
    checkCuda(cuda::launchEpilogue(epilogue, stream), "the epilogue kernel");
}

}  // namespace nmexport::trt
