#include "nm_linear_plugin.h"

namespace nmexport::trt {

namespace Input = NMLinearInput;

cuda::LinearArgs NmLinearPlugin::describedBy(cuda::DType type, const Shape& x,
                                             std::int64_t outputs) const {
    cuda::LinearArgs args;
    args.type = type;
    args.tokens = tokensOf(x);
    args.channels = static_cast<std::int32_t>(x.back());
    args.outputs = static_cast<std::int32_t>(outputs);
    // Keeping all m of m is the dense linear, with every constant where it belongs.
    args.selection.n = settings().sparsifies(sequenceOf(x)) ? settings().n : settings().m;
    args.selection.m = settings().m;
    args.selection.dynamicShift = settings().dynamicShift;
    args.selection.varianceCorrection = settings().varianceCorrection;
    return args;
}

cuda::LinearPath NmLinearPlugin::path() const {
    return tactic() == kTACTIC_PRODUCT ? cuda::LinearPath::kPRODUCT : cuda::LinearPath::kFASTER;
}

std::size_t NmLinearPlugin::workspaceBytes(cuda::DType type, const Shape& x,
                                           std::int64_t outputs) const {
    // Before tactic, device and sequence length are known: as much as any of them needs.
    cuda::LinearWork work = cuda::workOf(describedBy(type, x, outputs));
    work.needsMask = true;
    work.needsEpilogue = settings().dynamicShift || settings().varianceCorrection;
    return cuda::workspaceBytes(work, device(), cuda::LinearPath::kPRODUCT);
}

std::vector<std::int32_t> NmLinearPlugin::tactics(std::int64_t minTokens) const {
    if (minTokens > cuda::kMAX_DECODE_TOKENS) return {kTACTIC_PRODUCT};
    return {kTACTIC_BY_TOKENS, kTACTIC_PRODUCT};
}

void NmLinearPlugin::prepare(cuda::DType type, const Shape& x, std::int64_t outputs) {
    cuda::LinearWork work = cuda::workOf(describedBy(type, x, outputs));
    work.hasBias = settings().tensorOf(Input::bias) >= 0;
    mExecutor.prepare(work, device(), path());
}

void NmLinearPlugin::run(cuda::DType type, const Shape& x, std::int64_t outputs,
                         const Tensors& tensors, void* y, void* workspace, cudaStream_t stream) {
    cuda::LinearArgs args = describedBy(type, x, outputs);
    args.selection.scoreScale = tensors.data<float>(Input::score_scale);
    args.selection.channelOrder = tensors.data<std::int32_t>(Input::channel_order);
    args.selection.valueScale = tensors.data<float>(Input::value_scale);
    args.selection.shift = tensors.data<float>(Input::shift);
    args.selection.shiftLength = tensors.length(Input::shift);
    args.x = tensors.data(Input::X);
    args.w = tensors.data(Input::W);
    args.bias = tensors.data(Input::bias);
    args.shiftWeight = tensors.data<float>(Input::shift_weight);
    args.y = y;
    mExecutor.run(args, device(), path(), workspace, stream);
}

}  // namespace nmexport::trt
