#include "linear_node.h"

namespace nmexport {

namespace Input = NMLinearInput;

LinearNode::LinearNode(const OrtApi& api, const OrtKernelInfo* info)
    : LinearNode(Attributes(api, info, kNMLinear)) {}

LinearNode::LinearNode(const Attributes& attributes)
    : pattern(attributes.pattern()),
      dynamicShift(attributes.integer("dynamic_shift") != 0),
      varianceCorrection(attributes.integer("variance_correction") != 0),
      mPhase(phaseOf(attributes.text("phase"))) {
    if (attributes.integer("activation_bits") != 0) {
        throw Fault("NMLinear: activation_bits = 8 is not implemented here yet; allowed: 0");
    }
}

LinearNode::Phase LinearNode::phaseOf(const std::string& name) {
    if (name == "prefill") return Phase::kPREFILL;
    return name == "decode" ? Phase::kDECODE : Phase::kALL;
}

void LinearNode::check(const Inputs& inputs, const Shape& x, const Shape& w) const {
    if (w.size() != 2 || w[0] != x.back()) {
        throw Fault("NMLinear: input W has shape " + textOf(w) + " and X has shape " + textOf(x) +
                    "; allowed: X [..., K] with W [K, O], in_features first");
    }
    if (dynamicShift && inputs.has(Input::shift)) {
        throw Fault("NMLinear: dynamic_shift = 1 and an input shift exclude each other; drop one");
    }
    if (dynamicShift && !inputs.has(Input::shift_weight)) {
        throw Fault(
            "NMLinear: dynamic_shift = 1 needs the input shift_weight [O], the column sums of W");
    }
    if (inputs.has(Input::weight_zero_point)) {
        throw Fault("NMLinear: input weight_zero_point is not implemented here yet; leave it out");
    }
}

// The sequence length is the second-to-last dimension; a lone token is a sequence of one.
bool LinearNode::isExcluded(const Shape& x) const {
    const std::int64_t sequence = x.size() < 2 ? 1 : x[x.size() - 2];
    return (mPhase == Phase::kDECODE && sequence != 1) ||
           (mPhase == Phase::kPREFILL && sequence <= 1);
}

}  // namespace nmexport
