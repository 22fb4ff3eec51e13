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
    // Keeping all m of m without a correction is the dense linear.
    const bool isSparse = settings().sparsifies(sequenceOf(x));
    args.selection.n = isSparse ? settings().n : settings().m;
    args.selection.m = settings().m;
    args.selection.dynamicShift = isSparse && settings().dynamicShift;
    args.selection.varianceCorrection = isSparse && settings().varianceCorrection;
    return args;
}

int NmLinearPlugin::biasOf(const Shape& x) const {
    return settings().sparsifies(sequenceOf(x)) ? Input::bias : Input::dense_bias;
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
    work.hasBias = settings().tensorOf(biasOf(x)) >= 0;
    mExecutor.prepare(work, device(), path());
}

void NmLinearPlugin::run(cuda::DType type, const Shape& x, std::int64_t outputs,
                         const Tensors& tensors, void* y, void* workspace, cudaStream_t stream) {
    cuda::LinearArgs args = describedBy(type, x, outputs);
    args.selection.channelOrder = tensors.data<std::int32_t>(Input::channel_order);
    if (settings().sparsifies(sequenceOf(x))) {
        args.selection.scoreScale = tensors.data<float>(Input::score_scale);
        args.selection.valueScale = tensors.data<float>(Input::value_scale);
        args.selection.shift = tensors.data<float>(Input::shift);
        args.selection.shiftLength = tensors.length(Input::shift);
        args.shiftWeight = tensors.data<float>(Input::shift_weight);
    } else {
        args.selection.valueScale = tensors.data<float>(Input::dense_scale);
    }
    args.x = tensors.data(Input::X);
    args.w = tensors.data(Input::W);
    args.bias = tensors.data(biasOf(x));
    args.y = y;
    mExecutor.run(args, device(), path(), workspace, stream);
}

}  // namespace nmexport::trt
