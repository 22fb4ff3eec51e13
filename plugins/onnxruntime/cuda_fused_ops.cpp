// The ops of domain nmexport.fused for the CUDA provider; see fused_op.h.
#include <cuda_runtime_api.h>

#include <array>
#include <memory>
#include <optional>
#include <vector>

#include "between.h"
#include "cuda_device.h"
#include "cuda_fault.h"
#include "cuda_memory.h"
#include "cuda_stored.h"
#include "fused_op.h"
#include "linear_executor.h"
#include "node.h"
#include "ort_api.h"
#include "phase.h"

namespace nmexport {

namespace {

constexpr std::size_t kMAX_PHASE_NAME = 16;

// The product of all axes but the last.
std::int64_t tokensOf(const Shape& shape) {
    std::int64_t tokens = 1;
    for (std::size_t i = 0; i + 1 < shape.size(); ++i) tokens *= shape[i];
    return tokens;
}

const OrtValue* inputAt(const OrtApi& api, OrtKernelContext* context, std::size_t index) {
    const OrtValue* value = nullptr;
    check(api, api.KernelContext_GetInput(context, index, &value));
    return value;
}

// Null where the node leaves the input out.
const OrtValue* optionalInput(const OrtApi& api, OrtKernelContext* context, std::size_t index) {
    std::size_t count = 0;
    check(api, api.KernelContext_GetInputCount(context, &count));
    return index < count ? inputAt(api, context, index) : nullptr;
}

// Null where the input is absent, or no constant; its data may lie on the device.
const OrtValue* constantInput(const OrtApi& api, const OrtKernelInfo* info, std::size_t index) {
    std::size_t count = 0;
    check(api, api.KernelInfo_GetInputCount(info, &count));
    if (index >= count) return nullptr;
    int isConstant = 0;
    const OrtValue* value = nullptr;
    check(api, api.KernelInfoGetConstantInput_tensor(info, index, &isConstant, &value));
    return value;
}

// Throws Fault unless the input is absent, or a constant of rank 1; gives its size, and its data.
std::int64_t constantSize(const OrtApi& api, const OrtKernelInfo* info, std::size_t index,
                          const void** data) {
    const OrtValue* value = constantInput(api, info, index);
    if (value == nullptr) return 0;
    const Shape shape = shapeOf(api, value);
    if (shape.size() != 1) throw Fault("the constants of a selection have one axis");
    *data = dataOf(api, value);
    return shape.front();
}

// Its attribute `phase`.
Phase phaseOf(const OrtApi& api, const OrtKernelInfo* info) {
    std::string name(kMAX_PHASE_NAME, '\0');
    std::size_t size = name.size();
    check(api, api.KernelInfoGetAttribute_string(info, "phase", name.data(), &size));
    name.resize(size - 1);  // what ends it is counted
    return Phase(name);
}

// The selection that a node prunes its rows by: the optional inputs from `first` on. Kernels read
// these while the kernel before may still run, and no kernel checks an order: so all are constants,
// and the order is a permutation.
class PrunedRows {
  public:
    PrunedRows(const OrtApi& api, const OrtKernelInfo* info, std::size_t first)
        : mApi(api), mFirst(first), mPhase(phaseOf(api, info)) {
        std::int64_t n = 0;
        std::int64_t m = 0;
        check(api, api.KernelInfoGetAttribute_int64(info, "n", &n));
        check(api, api.KernelInfoGetAttribute_int64(info, "m", &m));
        mPattern = {static_cast<std::int32_t>(n), static_cast<std::int32_t>(m)};
        for (std::size_t i = 0; i < mSizes.size(); ++i) {
            const void* data = nullptr;
            mSizes[i] = constantSize(api, info, first + i, &data);
            if (i != kORDER || data == nullptr) continue;
            std::vector<std::int32_t> order(static_cast<std::size_t>(mSizes[i]));
            cuda::checkCuda(cudaMemcpy(order.data(), data, order.size() * sizeof(std::int32_t),
                                       cudaMemcpyDefault),
                            "reading channel_order");
            checkPermutation("a pruned row", order.data(), order.size());
        }
    }

    // The selection for rows of that shape; where the phase leaves them dense, they are gathered
    // alone. Throws Fault where constants do not fit.
    cuda::Selection of(OrtKernelContext* context, cuda::DType type, const Shape& rows) const {
        const auto channels = static_cast<std::int32_t>(rows.back());
        cuda::Selection selection = sparse(context, type, channels);
        if (!mPhase.excludes(rows)) return selection;
        cuda::Selection gathered;
        gathered.n = gathered.m = selection.m;
        gathered.channelOrder = selection.channelOrder;
        return gathered;
    }

  private:
    static constexpr std::size_t kORDER = 1;
    static constexpr std::size_t kSHIFT = 3;

    cuda::Selection sparse(OrtKernelContext* context, cuda::DType type,
                           std::int32_t channels) const {
        cuda::Selection selection;
        selection.n = mPattern.n;
        selection.m = mPattern.m;
        selection.scoreScale = at<float>(context, 0, channels);
        selection.channelOrder = at<std::int32_t>(context, kORDER, channels);
        selection.valueScale = at<float>(context, 2, channels);
        const bool isScalar = mSizes[kSHIFT] == 1;
        selection.shift = at<float>(context, kSHIFT, isScalar ? 1 : channels);
        selection.shiftLength = selection.shift == nullptr ? 0 : isScalar ? 1 : channels;
        if (!cuda::canPrune(type, channels, selection)) {
            throw Fault("rows of " + std::to_string(channels) + " channels cannot be pruned " +
                        std::to_string(mPattern.n) + ":" + std::to_string(mPattern.m) +
                        " where they are made; allowed: 16-bit types, groups of 16, up to " +
                        std::to_string(cuda::kMAX_PRUNED_CHANNELS) + " channels");
        }
        return selection;
    }

    template <typename T>
    const T* at(OrtKernelContext* context, std::size_t index, std::int64_t size) const {
        const OrtValue* value = optionalInput(mApi, context, mFirst + index);
        if (value == nullptr) return nullptr;
        if (mSizes[index] != size) {
            throw Fault("a constant of a selection has " + std::to_string(mSizes[index]) +
                        " elements, or is none; allowed: a constant of " + std::to_string(size));
        }
        return static_cast<const T*>(dataOf(mApi, value));
    }

    const OrtApi& mApi;
    std::size_t mFirst;
    Phase mPhase;
    Pattern mPattern{};
    std::array<std::int64_t, 4> mSizes{};
};

std::optional<PrunedRows> prunedRows(const OrtApi& api, const OrtKernelInfo* info, bool isPruned,
                                     std::size_t first) {
    if (!isPruned) return std::nullopt;
    return PrunedRows(api, info, first);
}

// `INPUTS`: one packed, or gate and up of their own.
template <std::size_t INPUTS, bool IS_PRUNED>
class GatedSiluKernel : public Kernel {
  public:
    GatedSiluKernel(const OrtApi& api, const OrtKernelInfo* info, ElementType type)
        : mApi(api), mType(type), mRows(prunedRows(api, info, IS_PRUNED, INPUTS)) {}

    void run(OrtKernelContext* context) const override {
        const OrtValue* gate = inputAt(mApi, context, 0);
        Shape shape = shapeOf(mApi, gate);
        const std::int64_t width = shape.empty() ? 0 : shape.back();
        const std::int64_t parts = INPUTS == 1 ? 2 : 1;
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
        args.up = INPUTS == 1 ? secondHalf(args.gate, shape.back())
                              : dataOf(mApi, second(context, shape));
        args.y = outputAt(mApi, context, 0, shape);
        args.isPruned = IS_PRUNED;
        if (mRows) args.selection = mRows->of(context, args.type, shape);
        cuda::checkCuda(cuda::launchGatedSilu(args, currentDevice(), streamOf(mApi, context)),
                        "the gated activation's kernel");
    }

  private:
    const void* secondHalf(const void* first, std::int64_t elements) const {
        const std::size_t bytes = mType == ElementType::kFLOAT32 ? 4 : 2;
        return static_cast<const char*>(first) + static_cast<std::size_t>(elements) * bytes;
    }

    const OrtValue* second(OrtKernelContext* context, const Shape& shape) const {
        const OrtValue* up = inputAt(mApi, context, 1);
        if (shapeOf(mApi, up) != shape) throw Fault("GatedSiluPair: gate and up differ in shape");
        return up;
    }

    const OrtApi& mApi;
    ElementType mType;
    std::optional<PrunedRows> mRows;
};

template <bool IS_PRUNED>
class ResidualNormKernel : public Kernel {
  public:
    ResidualNormKernel(const OrtApi& api, const OrtKernelInfo* info, ElementType type)
        : mApi(api), mType(type), mRows(prunedRows(api, info, IS_PRUNED, 3)) {
        check(api, api.KernelInfoGetAttribute_float(info, "epsilon", &mEpsilon));
    }

    void run(OrtKernelContext* context) const override {
        std::array<const OrtValue*, 3> inputs{};
        for (std::size_t i = 0; i < inputs.size(); ++i) {
            inputs[i] = inputAt(mApi, context, i);
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
        args.isPruned = IS_PRUNED;
        if (mRows) args.selection = mRows->of(context, args.type, shape);
        cuda::checkCuda(cuda::launchNorm(args, currentDevice(), streamOf(mApi, context)),
                        "the norm's kernel");
    }

  private:
    const OrtApi& mApi;
    ElementType mType;
    std::optional<PrunedRows> mRows;
    float mEpsilon = 0.0F;
};

class SparseLinearKernel : public Kernel {
  public:
    SparseLinearKernel(const OrtApi& api, const OrtKernelInfo* info, ElementType type,
                       StoredTypes stored)
        : mApi(api),
          mType(type),
          mStored(stored),
          mPhase(phaseOf(api, info)),
          mAllocator(api, info) {
        if (const OrtValue* scale = constantInput(api, info, kSCALE); scale != nullptr) {
            mConstants.scales = shapeOf(api, scale);
            mConstants.scale = dataOf(api, scale);
        }
        if (const OrtValue* zero = constantInput(api, info, kZERO); zero != nullptr) {
            mConstants.zeros = shapeOf(api, zero);
            mConstants.zero = dataOf(api, zero);
        }
    }

    void run(OrtKernelContext* context) const override {
        const OrtValue* s = inputAt(mApi, context, 0);
        const OrtValue* w = inputAt(mApi, context, 1);
        Shape shape = shapeOf(mApi, s);
        const OrtValue* bias =
            optionalInput(mApi, context, mPhase.excludes(shape) ? kDENSE_BIAS : kBIAS);
        const Shape weight = shapeOf(mApi, w);
        if (shape.empty() || weight.size() != 2 || weight[0] != shape.back() ||
            (bias != nullptr && shapeOf(mApi, bias) != Shape{weight[1]})) {
            throw Fault("SparseLinear: S, W and bias need shapes [..., K], [K, O] and [O]");
        }
        checkConstant(context, kSCALE, mConstants.scale);
        checkConstant(context, kZERO, mConstants.zero);
        cuda::LinearArgs args;
        args.type = elementOf(mType);
        args.tokens = tokensOf(shape);
        args.channels = static_cast<std::int32_t>(weight[0]);
        args.outputs = static_cast<std::int32_t>(weight[1]);
        args.selection.n = args.selection.m;
        args.isPruned = true;
        args.x = dataOf(mApi, s);
        args.w = dataOf(mApi, w);
        args.stored = storedWeights("SparseLinear", mType, mStored, weight, mConstants);
        args.bias = bias == nullptr ? nullptr : dataOf(mApi, bias);
        shape.back() = weight[1];
        args.y = outputAt(mApi, context, 0, shape);
        const cuda::DeviceTraits& device = currentDevice();
        const std::size_t bytes =
            cuda::workspaceBytes(cuda::workOf(args), device, cuda::LinearPath::kFASTER);
        const DeviceScratch scratch(mApi, context, mAllocator.get(), bytes);
        mExecutor.run(args, device, cuda::LinearPath::kFASTER, scratch.data(),
                      streamOf(mApi, context));
    }

  private:
    static constexpr std::size_t kBIAS = 2;
    static constexpr std::size_t kSCALE = 3;
    static constexpr std::size_t kZERO = 4;
    static constexpr std::size_t kDENSE_BIAS = 5;

    // Throws Fault where an input is there and is no constant: the decode kernels read these while
    // the kernel before may still run.
    void checkConstant(OrtKernelContext* context, std::size_t input, const void* constant) const {
        if (constant != nullptr || optionalInput(mApi, context, input) == nullptr) return;
        throw Fault(std::string("SparseLinear: input ") +
                    (input == kSCALE ? "weight_scale" : "weight_zero_point") +
                    " must be a constant of the model; make it an initializer");
    }

    const OrtApi& mApi;
    ElementType mType;
    StoredTypes mStored;
    Phase mPhase;
    StoredConstants mConstants;
    DeviceAllocator mAllocator;
    mutable cuda::LinearExecutor mExecutor;
};

template <typename K>
std::unique_ptr<Kernel> make(const OrtApi& api, const OrtKernelInfo* info, ElementType type) {
    return std::make_unique<K>(api, info, type);
}

FusedSpec sparseLinear(const StoredTypes& stored) {
    const auto like = [](ONNXTensorElementDataType type, bool isOptional) {
        return FusedInput{InputType::kT, isOptional, false, type};
    };
    const auto make = [stored](const OrtApi& api, const OrtKernelInfo* info, ElementType type) {
        return std::make_unique<SparseLinearKernel>(api, info, type, stored);
    };
    return {"SparseLinear",
            {FusedInput{}, like(stored.weights, false), FusedInput{InputType::kT, true},
             like(stored.scales, true), like(stored.zeros, true), FusedInput{InputType::kT, true}},
            1,
            kCUDA_PROVIDER,
            make};
}

}  // namespace

const std::vector<FusedOp>& cudaFusedOps() {
    static const std::vector<FusedOp> ops = [] {
        const FusedInput t{};
        const FusedInput scale{InputType::kFLOAT32, true};
        const FusedInput order{InputType::kINT32, true};
        const std::vector<FusedSpec> specs = {
            {"GatedSilu", {t}, 1, kCUDA_PROVIDER, make<GatedSiluKernel<1, false>>},
            {"GatedSiluPair", {t, t}, 1, kCUDA_PROVIDER, make<GatedSiluKernel<2, false>>},
            {"ResidualNorm", {t, t, t}, 2, kCUDA_PROVIDER, make<ResidualNormKernel<false>>},
            {"Likeliest", {t}, 1, kCUDA_PROVIDER, makeCudaLikeliestKernel, false, true}};
        const std::vector<FusedSpec> pruned = {{"PrunedGatedSilu",
                                                {t, scale, order, scale, scale},
                                                1,
                                                kCUDA_PROVIDER,
                                                make<GatedSiluKernel<1, true>>},
                                               {"PrunedGatedSiluPair",
                                                {t, t, scale, order, scale, scale},
                                                1,
                                                kCUDA_PROVIDER,
                                                make<GatedSiluKernel<2, true>>},
                                               {"PrunedResidualNorm",
                                                {t, t, t, scale, order, scale, scale},
                                                2,
                                                kCUDA_PROVIDER,
                                                make<ResidualNormKernel<true>>}};
        std::vector<FusedOp> made;
        for (const ElementType type :
             {ElementType::kFLOAT32, ElementType::kFLOAT16, ElementType::kBFLOAT16}) {
            for (const FusedSpec& spec : specs) made.emplace_back(spec, type);
            if (type == ElementType::kFLOAT32)
                continue;  // see canPrune; GroupQueryAttention has none
            for (const FusedSpec& spec : pruned) made.emplace_back(spec, type);
            for (const StoredTypes& stored : storedTypesFor(type)) {
                made.emplace_back(sparseLinear(stored), type);
            }
            made.emplace_back(cachedAttention(kCUDA_PROVIDER, makeCudaAttentionKernel), type);
        }
        return made;
    }();
    return ops;
}

}  // namespace nmexport
