#include "nm_linear.h"

#include "custom_op.h"
#include "node.h"

namespace nmexport {

namespace {

namespace Input = NMLinearInput;

enum class Phase { kALL, kPREFILL, kDECODE };

Phase phaseOf(const std::string& name) {
    if (name == "prefill") return Phase::kPREFILL;
    return name == "decode" ? Phase::kDECODE : Phase::kALL;
}

class LinearKernel : public Kernel {
  public:
    LinearKernel(const OrtApi& api, const OrtKernelInfo* info, ElementType type)
        : LinearKernel(api, info, type, Attributes(api, info, kNMLinear)) {}

    void run(OrtKernelContext* context) const override {
        const Inputs inputs(mApi, context, kNMLinear, mShapes);
        const Shape x = inputs.shape(Input::X);
        const Rows rows = rowsOf(kNMLinear.name, x, mPattern);
        const Shape w = inputs.shape(Input::W);
        checkShapes(inputs, x, w);

        LinearArguments arguments;
        arguments.type = mType;
        arguments.tokens = rows.tokens;
        arguments.channels = rows.channels;
        arguments.outputs = static_cast<std::size_t>(w[1]);
        arguments.pattern = mPattern;
        arguments.x = inputs.data(Input::X);
        arguments.w = inputs.data(Input::W);
        arguments.bias = inputs.vector(Input::bias, w[1]);
        arguments.shiftWeight = static_cast<const float*>(inputs.vector(Input::shift_weight, w[1]));
        arguments.constants.dynamicShift = mDynamicShift;
        arguments.constants.shift =
            static_cast<const float*>(inputs.vector(Input::shift, x.back(), 1));
        if (arguments.constants.shift != nullptr) {
            arguments.constants.shiftCount =
                static_cast<std::size_t>(inputs.shape(Input::shift)[0]);
        }
        arguments.constants.scoreScale =
            static_cast<const float*>(inputs.vector(Input::score_scale, x.back()));
        arguments.constants.channelOrder = mOrder.of(inputs, rows.channels);
        arguments.varianceCorrection = mVarianceCorrection;
        arguments.varianceFloor = kVARIANCE_FLOOR;
        arguments.keepAll = isExcluded(x);

        Shape y = x;
        y.back() = w[1];
        arguments.y = outputData(mApi, context, y);
        Pool pool(mApi, context);
        nmLinear(arguments, pool.threads());
    }

  private:
    LinearKernel(const OrtApi& api, const OrtKernelInfo* info, ElementType type,
                 const Attributes& attributes)
        : mApi(api),
          mType(type),
          mPattern(attributes.pattern()),
          mDynamicShift(attributes.integer("dynamic_shift") != 0),
          mVarianceCorrection(attributes.integer("variance_correction") != 0),
          mPhase(phaseOf(attributes.text("phase"))),
          mShapes(api, info, kNMLinear),
          mOrder(mShapes, Input::channel_order, kNMLinear) {}

    void checkShapes(const Inputs& inputs, const Shape& x, const Shape& w) const {
        if (w.size() != 2 || w[0] != x.back()) {
            throw Fault("NMLinear: input W has shape " + textOf(w) + " and X has shape " +
                        textOf(x) + "; allowed: X [..., K] with W [K, O], in_features first");
        }
        const bool hasShift = inputs.has(Input::shift);
        if (mDynamicShift && hasShift) {
            throw Fault(
                "NMLinear: dynamic_shift = 1 and an input shift exclude each other; drop one");
        }
        if (mDynamicShift && !inputs.has(Input::shift_weight)) {
            throw Fault(
                "NMLinear: dynamic_shift = 1 needs the input shift_weight [O], the column sums "
                "of W");
        }
    }

    // The sequence length is the second-to-last dimension; a lone token is a sequence of one.
    bool isExcluded(const Shape& x) const {
        const std::int64_t sequence = x.size() < 2 ? 1 : x[x.size() - 2];
        return (mPhase == Phase::kDECODE && sequence != 1) ||
               (mPhase == Phase::kPREFILL && sequence <= 1);
    }

    const OrtApi& mApi;
    ElementType mType;
    Pattern mPattern;
    bool mDynamicShift;
    bool mVarianceCorrection;
    Phase mPhase;
    InputShapes mShapes;
    ChannelOrder mOrder;
};

}  // namespace

std::unique_ptr<Kernel> makeLinearKernel(const OrtApi& api, const OrtKernelInfo* info,
                                         ElementType type) {
    return std::make_unique<LinearKernel>(api, info, type);
}

}  // namespace nmexport
