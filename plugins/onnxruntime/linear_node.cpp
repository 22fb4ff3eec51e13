#include "linear_node.h"

namespace nmexport {

namespace Input = NMLinearInput;

LinearNode::LinearNode(const NodeInfo& node) : LinearNode(Attributes(node, kNMLinear)) {}

LinearNode::LinearNode(const Attributes& attributes)
    : pattern(attributes.pattern()),
      dynamicShift(attributes.integer("dynamic_shift") != 0),
      varianceCorrection(attributes.integer("variance_correction") != 0),
      roundsActivations(hasActivationBits(attributes)),
      activationBlock(static_cast<std::size_t>(attributes.integer("activation_block"))),
      phase(attributes.text("phase")) {}

bool LinearNode::hasActivationBits(const Attributes& attributes) {
    const std::int64_t bits = attributes.integer("activation_bits");
    if (bits != 0 && bits != 8) {
        throw Fault("NMLinear: attribute activation_bits is " + std::to_string(bits) +
                    "; allowed: 0 or 8");
    }
    return bits == 8;
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
    if (!phase.isAll()) return;
    for (const int input : {Input::dense_scale, Input::dense_bias}) {
        if (!inputs.has(input)) continue;
        throw Fault(std::string("NMLinear: input ") + kNMLinearInputs[input].name +
                    " goes with phase decode or prefill; with all, no token is dense");
    }
}

void LinearNode::checkElementWeights(const Inputs& inputs) const {
    const char* given = inputs.has(Input::weight_scale)        ? "input weight_scale"
                        : inputs.has(Input::weight_zero_point) ? "input weight_zero_point"
                        : roundsActivations                    ? "activation_bits = 8"
                                                               : nullptr;
    if (given == nullptr) return;
    throw Fault(std::string("NMLinear: ") + given +
                " goes with an int8, int4 or uint4 W; this W is of X's type");
}

}  // namespace nmexport
