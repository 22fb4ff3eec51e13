// NMPrune and NMLinear for ONNX Runtime's CUDA execution provider: inputs are checked and arguments
// filled here, which kernels run is the executor's business.
#include <cuda_runtime_api.h>

#include <limits>
#include <mutex>

#include "cuda_device.h"
#include "cuda_fault.h"
#include "cuda_memory.h"
#include "cuda_stored.h"
#include "custom_op.h"
#include "linear_executor.h"
#include "linear_node.h"
#include "nm_cuda.h"
#include "plan_table.h"

namespace nmexport {

namespace {

std::int32_t asInt(std::size_t value, const char* what) {
    if (value > static_cast<std::size_t>(std::numeric_limits<std::int32_t>::max())) {
        throw Fault(std::string("nmexport: ") + what + " is " + std::to_string(value) +
                    "; allowed: up to 2147483647");
    }
    return static_cast<std::int32_t>(value);
}

// Throws Fault where an input is there and is no constant: the decode kernel reads these while the
// kernel before it may still run (see cuda::Selection), so none may be made by another node.
void checkConstant(const Inputs& inputs, const InputShapes& shapes, const OpSpec& spec, int input) {
    if (!inputs.has(input) || shapes.constantShape(input) != nullptr) return;
    throw Fault(std::string(spec.name) + ": input " + spec.inputs[input].name +
                " must be a constant of the model where the node runs on a GPU; make it an "
                "initializer");
}

// A constant of the selection, or null.
template <typename T>
const T* constantVector(const Inputs& inputs, const InputShapes& shapes, const OpSpec& spec,
                        int input, std::int64_t size, std::int64_t otherSize = -1) {
    const void* data = inputs.vector(input, size, otherSize);
    checkConstant(inputs, shapes, spec, input);
    return static_cast<const T*>(data);
}

// The constant input channel_order: checked once, through a copy where it lies on the device.
class DeviceOrder {
  public:
    DeviceOrder(const InputShapes& shapes, const OpSpec& spec, int input)
        : mShapes(shapes), mSpec(spec), mInput(input) {
        const Shape* shape = shapes.constantShape(input);
        if (shape == nullptr || shape->size() != 1) return;  // refused at the run
        std::vector<std::int32_t> order(static_cast<std::size_t>(shape->front()));
        cuda::checkCuda(cudaMemcpy(order.data(), shapes.constantData(input),
                                   order.size() * sizeof(std::int32_t), cudaMemcpyDefault),
                        "reading channel_order");
        checkPermutation(spec.name, order.data(), order.size());
    }

    const std::int32_t* of(const Inputs& inputs, std::int64_t channels) const {
        return constantVector<std::int32_t>(inputs, mShapes, mSpec, mInput, channels);
    }

  private:
    const InputShapes& mShapes;
    const OpSpec& mSpec;
    int mInput;
};

// A constant's data, as InputShapes hands it out, may lie on the device here.
class CudaPruneKernel : public Kernel {
  public:
    CudaPruneKernel(const OrtApi& api, const OrtKernelInfo* info, ElementType type)
        : mApi(api),
          mType(type),
          mPattern(Attributes({api, info}, kNMPrune).pattern()),
          mShapes({api, info}, kNMPrune),
          mOrder(mShapes, kNMPrune, NMPruneInput::channel_order) {}

    void run(OrtKernelContext* context) const override {
        const OrtRun run(mApi, context);
        const Inputs inputs(run, kNMPrune, mShapes);
        const Shape shape = inputs.shape(NMPruneInput::X);
        const Rows rows = rowsOf(kNMPrune.name, shape, mPattern);
        cuda::MaskArgs args;
        args.type = elementOf(mType);
        args.tokens = static_cast<std::int64_t>(rows.tokens);
        args.channels = asInt(rows.channels, "the last axis of X");
        args.selection.n = mPattern.n;
        args.selection.m = mPattern.m;
        args.selection.scoreScale =
            static_cast<const float*>(inputs.vector(NMPruneInput::score_scale, shape.back()));
        args.selection.channelOrder = mOrder.of(inputs, shape.back());
        args.x = inputs.data(NMPruneInput::X);
        args.s = run.output(0, shape);
        cuda::checkCuda(cuda::launchMask(args, streamOf(mApi, context)), "the mask kernel");
    }

  private:
    const OrtApi& mApi;
    ElementType mType;
    Pattern mPattern;
    InputShapes mShapes;
    DeviceOrder mOrder;
};

class CudaLinearKernel : public Kernel {
  public:
    CudaLinearKernel(const OrtApi& api, const OrtKernelInfo* info, ElementType type,
                     StoredTypes stored)
        : mApi(api),
          mType(type),
          mStored(stored),
          mNode({api, info}),
          mShapes({api, info}, kNMLinear),
          mOrder(mShapes, kNMLinear, NMLinearInput::channel_order),
          mAllocator(api, info) {
        if (!mNode.roundsActivations) return;
        throw Fault(
            "NMLinear: activation_bits is 8, which runs on a CPU alone; allowed on a GPU: 0, which "
            "a build with --activations float makes");
    }

    void run(OrtKernelContext* context) const override {
        const OrtRun run(mApi, context);
        const Inputs inputs(run, kNMLinear, mShapes);
        const Shape x = inputs.shape(NMLinearInput::X);
        const Shape w = inputs.shape(NMLinearInput::W);
        const Rows rows = rowsOf(kNMLinear.name, x, mNode.pattern);
        mNode.check(inputs, x, w);

        cuda::LinearArgs args;
        args.type = elementOf(mType);
        args.tokens = static_cast<std::int64_t>(rows.tokens);
        args.channels = asInt(rows.channels, "the last axis of X");
        args.outputs = asInt(static_cast<std::size_t>(w[1]), "the last axis of W");
        args.selection = selectionOf(inputs, x);
        args.x = inputs.data(NMLinearInput::X);
        args.w = inputs.data(NMLinearInput::W);
        args.stored = storedWeights(kNMLinear.name, mType, mStored, w, storedConstants(inputs));
        const void* const bias = inputs.vector(NMLinearInput::bias, w[1]);
        const void* const denseBias = inputs.vector(NMLinearInput::dense_bias, w[1]);
        args.bias = mNode.phase.excludes(x) ? denseBias : bias;
        args.shiftWeight =
            static_cast<const float*>(inputs.vector(NMLinearInput::shift_weight, w[1]));
        Shape y = x;
        y.back() = w[1];
        args.y = run.output(0, y);
        if (args.tokens == 0) return;

        const cuda::DeviceTraits& device = currentDevice();
        const std::size_t bytes =
            cuda::workspaceBytes(cuda::workOf(args), device, cuda::LinearPath::kFASTER);
        const DeviceScratch scratch(mApi, context, mAllocator.get(), bytes);
        mExecutor.run(args, device, cuda::LinearPath::kFASTER, scratch.data(),
                      streamOf(mApi, context));
    }

  private:
    StoredConstants storedConstants(const Inputs& inputs) const {
        StoredConstants constants;
        for (const int input : {NMLinearInput::weight_scale, NMLinearInput::weight_zero_point}) {
            checkConstant(inputs, mShapes, kNMLinear, input);
            if (!inputs.has(input)) continue;
            const bool isScale = input == NMLinearInput::weight_scale;
            (isScale ? constants.scales : constants.zeros) = inputs.shape(input);
            (isScale ? constants.scale : constants.zero) = inputs.data(input);
        }
        return constants;
    }

    cuda::Selection selectionOf(const Inputs& inputs, const Shape& x) const {
        const float* const denseScale =
            constantVector<float>(inputs, mShapes, kNMLinear, NMLinearInput::dense_scale, x.back());
        cuda::Selection selection;
        selection.n = mNode.pattern.n;
        selection.m = mNode.pattern.m;
        selection.scoreScale =
            constantVector<float>(inputs, mShapes, kNMLinear, NMLinearInput::score_scale, x.back());
        selection.channelOrder = mOrder.of(inputs, x.back());
        selection.valueScale =
            constantVector<float>(inputs, mShapes, kNMLinear, NMLinearInput::value_scale, x.back());
        selection.shift =
            constantVector<float>(inputs, mShapes, kNMLinear, NMLinearInput::shift, x.back(), 1);
        if (selection.shift != nullptr) {
            selection.shiftLength =
                static_cast<std::int32_t>(inputs.shape(NMLinearInput::shift)[0]);
        }
        selection.dynamicShift = mNode.dynamicShift;
        selection.varianceCorrection = mNode.varianceCorrection;
        if (!mNode.phase.excludes(x)) return selection;
        cuda::Selection dense;  // with none of the corrections
        dense.n = dense.m = selection.m;
        dense.channelOrder = selection.channelOrder;
        dense.valueScale = denseScale;
        return dense;
    }

    const OrtApi& mApi;
    ElementType mType;
    StoredTypes mStored;
    LinearNode mNode;
    InputShapes mShapes;
    DeviceOrder mOrder;
    DeviceAllocator mAllocator;
    mutable cuda::LinearExecutor mExecutor;
};

}  // namespace

std::unique_ptr<Kernel> makeCudaPruneKernel(const OrtApi& api, const OrtKernelInfo* info,
                                            ElementType type) {
    return std::make_unique<CudaPruneKernel>(api, info, type);
}

std::unique_ptr<Kernel> makeCudaLinearKernel(const OrtApi& api, const OrtKernelInfo* info,
                                             ElementType type, StoredTypes stored) {
    return std::make_unique<CudaLinearKernel>(api, info, type, stored);
}

}  // namespace nmexport

// The current device as JSON for measurements; empty where there is none.
extern "C" __attribute__((visibility("default"))) const char* nmexport_cuda_device() {
    static thread_local std::string text;
    nmexport::cuda::DeviceTraits traits;
    text.clear();
    if (nmexport::cuda::queryDevice(&traits) == cudaSuccess) {
        text = "{\"compute_capability\": " + std::to_string(traits.computeCapability) +
               ", \"multiprocessors\": " + std::to_string(traits.multiprocessors) + "}";
    }
    return text.c_str();
}

// The decode shapes to choose plans from, as JSON: [lanes, vectors, warps, unroll, resident warps].
extern "C" __attribute__((visibility("default"))) const char* nmexport_cuda_shapes() {
    static const std::string text = [] {
        std::string list;
        for (const nmexport::cuda::TunedShape& shape : nmexport::cuda::kTUNED_SHAPES) {
            list += (list.empty() ? "[" : ", [") + std::to_string(shape.lanesPerRow) + ", " +
                    std::to_string(shape.vectors) + ", " + std::to_string(shape.warps) + ", " +
                    std::to_string(shape.unroll) + ", " + std::to_string(shape.residentWarps) + "]";
        }
        return "[" + list + "]";
    }();
    return text.c_str();
}

// Puts measured plans in front of the compiled ones (see plan_table.h); 0, or the faulty line.
extern "C" __attribute__((visibility("default"))) int nmexport_use_cuda_plans(const char* text) {
    try {
        return nmexport::cuda::setPlanTable(text);
    } catch (...) {
        return -1;
    }
}
