#include "nm_linear.h"

#include <memory>
#include <mutex>
#include <optional>

#include "cpu_kernels.h"
#include "linear_node.h"
#include "stored_weights.h"
#include "weight_copy.h"

namespace nmexport {

namespace {

namespace Input = NMLinearInput;

// All that a run takes from the node, checked; what varies from run to run is not set.
struct Prepared {
    LinearArguments arguments;  // of tokens that the phase includes
    const void* denseBias = nullptr;
    const float* denseScale = nullptr;
    StoredWeights stored;
    ConstantsCopy copy;  // of the arguments', where nothing but X can change
    Shape w;
};

class LinearKernel : public CpuKernel {
  public:
    LinearKernel(const NodeInfo& node, ElementType type, StoredTypes stored,
                 const SessionSettings& settings)
        : CpuKernel(node.api(), settings.threads),
          mType(type),
          mStored(stored),
          mWeights(weightTypeOf(stored.weights)),
          mHugePages(settings.hugePages),
          mNode(node),
          mShapes(node, kNMLinear),
          mOrder(mShapes, Input::channel_order, kNMLinear) {
        const bool isElement = mWeights == WeightType::kELEMENT;
        const bool isNibbles = !isElement && mWeights != WeightType::kINT8;
        // Integers that are widened are copied thereby.
        if (!settings.hugePages || (isNibbles && !mNode.roundsActivations)) return;
        mCopy.emplace(mShapes, isElement ? elementBytes(type) : 1, isNibbles ? 2 : 1);
    }

    void compute(const Run& run) const override {
        const Inputs inputs(run, kNMLinear, mShapes);
        const Shape x = inputs.shape(Input::X);
        std::call_once(mLookedAt, [&] { prepareConstants(inputs, x); });
        if (mConstant != nullptr && !x.empty() && x.back() == mConstant->w[0]) {
            mConstant->copy.prefetch();
            return multiply(run, inputs, x, *mConstant);
        }
        Prepared prepared;
        prepare(inputs, x, prepared);
        multiply(run, inputs, x, prepared);
    }

  private:
    // If nothing but X can change, the rest is checked once, in the first run.
    void prepareConstants(const Inputs& inputs, const Shape& x) const {
        for (std::size_t i = 0; i < kNMLinear.inputCount; ++i) {
            const int input = static_cast<int>(i);
            if (input == Input::X || !inputs.has(input)) continue;
            if (mShapes.constantData(input) == nullptr) return;
        }
        auto prepared = std::make_unique<Prepared>();
        prepare(inputs, x, *prepared);
        prepared->copy.place(prepared->arguments);
        if (mCopy.has_value()) prepared->arguments.w = mCopy->rows(prepared->arguments.w);
        mConstant = std::move(prepared);
    }

    // Throws Fault where inputs do not fit each other.
    void prepare(const Inputs& inputs, const Shape& x, Prepared& prepared) const {
        const Rows rows = rowsOf(kNMLinear.name, x, mNode.pattern);
        prepared.w = inputs.shape(Input::W);
        const Shape& w = prepared.w;
        mNode.check(inputs, x, w);

        LinearArguments& arguments = prepared.arguments;
        arguments.type = mType;
        arguments.channels = rows.channels;
        arguments.outputs = static_cast<std::size_t>(w[1]);
        arguments.pattern = mNode.pattern;
        arguments.w = inputs.data(Input::W);
        if (mWeights == WeightType::kELEMENT) {
            mNode.checkElementWeights(inputs);
        } else {
            prepared.stored = StoredWeights(inputs, mNode, mStored, w, mHugePages);
            prepared.stored.place(arguments);
        }
        arguments.bias = inputs.vector(Input::bias, w[1]);
        arguments.shiftWeight = static_cast<const float*>(inputs.vector(Input::shift_weight, w[1]));
        arguments.constants.dynamicShift = mNode.dynamicShift;
        arguments.constants.shift =
            static_cast<const float*>(inputs.vector(Input::shift, x.back(), 1));
        if (arguments.constants.shift != nullptr) {
            arguments.constants.shiftCount =
                static_cast<std::size_t>(inputs.shape(Input::shift)[0]);
        }
        arguments.constants.scoreScale =
            static_cast<const float*>(inputs.vector(Input::score_scale, x.back()));
        arguments.constants.channelOrder = mOrder.of(inputs, rows.channels);
        arguments.valueScale =
            static_cast<const float*>(inputs.vector(Input::value_scale, x.back()));
        arguments.varianceCorrection = mNode.varianceCorrection;
        arguments.varianceFloor = kVARIANCE_FLOOR;
        arguments.keepAll = false;
        prepared.denseBias = inputs.vector(Input::dense_bias, w[1]);
        prepared.denseScale =
            static_cast<const float*>(inputs.vector(Input::dense_scale, x.back()));
    }

    // The same call for tokens that the phase excludes: W and the two constants of their own.
    static void leaveDense(LinearArguments& arguments, const Prepared& prepared) {
        SelectionConstants constants{};
        constants.channelOrder = arguments.constants.channelOrder;
        arguments.constants = constants;
        arguments.shiftWeight = nullptr;
        arguments.varianceCorrection = false;
        arguments.valueScale = prepared.denseScale;
        arguments.bias = prepared.denseBias;
        arguments.keepAll = true;
    }

    void multiply(const Run& run, const Inputs& inputs, const Shape& x,
                  const Prepared& prepared) const {
        LinearArguments arguments = prepared.arguments;
        arguments.x = inputs.data(Input::X);
        arguments.tokens = rowsOf(kNMLinear.name, x, mNode.pattern).tokens;
        if (mNode.phase.excludes(x)) leaveDense(arguments, prepared);
        Shape y = x;
        y.back() = prepared.w[1];
        arguments.y = run.output(0, y);
        nmLinear(arguments, run.threads());
    }

    ElementType mType;
    StoredTypes mStored;
    WeightType mWeights;
    bool mHugePages;
    LinearNode mNode;
    InputShapes mShapes;
    ChannelOrder mOrder;
    std::optional<WeightCopy> mCopy;  // read by mConstant alone
    mutable std::once_flag mLookedAt;
    mutable std::unique_ptr<const Prepared> mConstant;  // null where more than X can change
};

}  // namespace

std::unique_ptr<CpuKernel> makeLinearKernel(const NodeInfo& node, ElementType type,
                                            StoredTypes stored, const SessionSettings& settings) {
    return std::make_unique<LinearKernel>(node, type, stored, settings);
}

}  // namespace nmexport
