// The ops of domain nmexport.fused for the CUDA provider; see fused_op.h.
#include <cuda_runtime_api.h>

#include <array>
#include <memory>

#include "between.h"
#include "cuda_device.h"
#include "cuda_fault.h"
#include "fused_op.h"
#include "ort_api.h"

namespace nmexport {

namespace {

// The product of all axes but the last.
std::int64_t tokensOf(const Shape& shape) {
    std::int64_t tokens = 1;
    for (std::size_t i = 0; i + 1 < shape.size(); ++i) tokens *= shape[i];
    return tokens;
}

class GatedSiluKernel : public Kernel {
  public:
    GatedSiluKernel(const OrtApi& api, const OrtKernelInfo*, ElementType type)
        : mApi(api), mType(type) {}

    void run(OrtKernelContext* context) const override {
        std::size_t count = 0;
        check(mApi, mApi.KernelContext_GetInputCount(context, &count));
        const OrtValue* gate = nullptr;
        check(mApi, mApi.KernelContext_GetInput(context, 0, &gate));
        Shape shape = shapeOf(mApi, gate);
        const std::int64_t width = shape.empty() ? 0 : shape.back();
        const std::int64_t parts = count == 1 ? 2 : 1;  // of one value, or values of their own
        if (width == 0 || width % (8 * parts) != 0) {
            throw Fault("GatedSilu: the last axis has " + std::to_string(width) +
                        " elements; allowed: a multiple of " + std::to_string(8 * parts));
        }
        shape.back() = width / parts;
        cuda::GatedSiluArgs args;
        args.type = elementOf(mType);
        args.tokens = tokensOf(shape);
        args.channels = static_cast<std::int32_t>(shape.back());
        args.stride = width;
        args.gate = dataOf(mApi, gate);
        args.up =
            count == 1 ? secondHalf(args.gate, shape.back()) : dataOf(mApi, second(context, shape));
        args.y = outputAt(mApi, context, 0, shape);
        cuda::checkCuda(cuda::launchGatedSilu(args, currentDevice(), streamOf(mApi, context)),
                        "the gated activation's kernel");
    }

  private:
    const void* secondHalf(const void* first, std::int64_t elements) const {
        const std::size_t bytes = mType == ElementType::kFLOAT32 ? 4 : 2;
        return static_cast<const char*>(first) + static_cast<std::size_t>(elements) * bytes;
    }

    const OrtValue* second(OrtKernelContext* context, const Shape& shape) const {
        const OrtValue* up = nullptr;
        check(mApi, mApi.KernelContext_GetInput(context, 1, &up));
        if (shapeOf(mApi, up) != shape) throw Fault("GatedSiluPair: gate and up differ in shape");
        return up;
    }

    const OrtApi& mApi;
    ElementType mType;
};

class ResidualNormKernel : public Kernel {
  public:
    ResidualNormKernel(const OrtApi& api, const OrtKernelInfo* info, ElementType type)
        : mApi(api), mType(type) {
        check(api, api.KernelInfoGetAttribute_float(info, "epsilon", &mEpsilon));
    }

    void run(OrtKernelContext* context) const override {
        std::array<const OrtValue*, 3> inputs{};
        for (std::size_t i = 0; i < inputs.size(); ++i) {
            check(mApi, mApi.KernelContext_GetInput(context, i, &inputs[i]));
        }
        const Shape shape = shapeOf(mApi, inputs[0]);
        const Shape weight = shapeOf(mApi, inputs[2]);
        if (shape != shapeOf(mApi, inputs[1]) || weight.size() != 1 || shape.empty() ||
            weight[0] != shape.back() || weight[0] % 8 != 0) {
            throw Fault(
                "ResidualNorm: X and skip need one shape [..., K], weight [K], K a multiple of 8");
        }
        cuda::NormArgs args;
        args.type = elementOf(mType);
        args.channels = static_cast<std::int32_t>(shape.back());
        args.tokens = tokensOf(shape);
        args.epsilon = mEpsilon;
        args.x = dataOf(mApi, inputs[0]);
        args.skip = dataOf(mApi, inputs[1]);
        args.weight = dataOf(mApi, inputs[2]);
        args.y = outputAt(mApi, context, 0, shape);
        args.sum = outputAt(mApi, context, 1, shape);
        cuda::checkCuda(cuda::launchNorm(args, currentDevice(), streamOf(mApi, context)),
                        "the norm's kernel");
    }

  private:
    const OrtApi& mApi;
    ElementType mType;
    float mEpsilon = 0.0F;
};

template <typename K>
std::unique_ptr<Kernel> make(const OrtApi& api, const OrtKernelInfo* info, ElementType type) {
    return std::make_unique<K>(api, info, type);
}

}  // namespace

const std::vector<FusedOp>& cudaFusedOps() {
    static const std::vector<FusedOp> ops = [] {
        const FusedInput t{};
        const std::vector<FusedSpec> specs = {
            {"GatedSilu", {t}, 1, kCUDA_PROVIDER, make<GatedSiluKernel>},
            {"GatedSiluPair", {t, t}, 1, kCUDA_PROVIDER, make<GatedSiluKernel>},
            {"ResidualNorm", {t, t, t}, 2, kCUDA_PROVIDER, make<ResidualNormKernel>},
            cachedAttention(kCUDA_PROVIDER, makeCudaAttentionKernel)};
        std::vector<FusedOp> made;
        for (const FusedSpec& spec : specs) {
            for (const ElementType type :
                 {ElementType::kFLOAT32, ElementType::kFLOAT16, ElementType::kBFLOAT16}) {
                made.emplace_back(spec, type);
            }
        }
        return made;
    }();
    return ops;
}

}  // namespace nmexport
