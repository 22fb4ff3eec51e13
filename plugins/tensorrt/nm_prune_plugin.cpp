#include "nm_prune_plugin.h"

#include "cuda_fault.h"

namespace nmexport::trt {

namespace Input = NMPruneInput;

void NmPrunePlugin::run(cuda::DType type, const Shape& x, std::int64_t, const Tensors& tensors,
                        void* y, void*, cudaStream_t stream) {
    cuda::MaskArgs args;
    args.type = type;
    args.tokens = tokensOf(x);
    args.channels = static_cast<std::int32_t>(x.back());
    args.selection.n = settings().n;
    args.selection.m = settings().m;
    args.selection.scoreScale = tensors.data<float>(Input::score_scale);
    args.selection.channelOrder = tensors.data<std::int32_t>(Input::channel_order);
    args.x = tensors.data(Input::X);
    args.s = y;
    cuda::checkCuda(cuda::launchMask(args, stream), "the mask kernel");
}

}  // namespace nmexport::trt
