// An NMLinear node's attributes and which inputs fit them, whichever device runs it.
#pragma once

#include "node.h"
#include "phase.h"

namespace nmexport {

class LinearNode {
  public:
    // Throws Fault where an attribute is missing, of another type, or out of range.
    explicit LinearNode(const NodeInfo& node);

    // Throws Fault where W, the shift and its weight do not fit X and the attributes.
    void check(const Inputs& inputs, const Shape& x, const Shape& w) const;
    // Throws Fault where an input or attribute goes with integers and W is of X's type.
    void checkElementWeights(const Inputs& inputs) const;

    const Pattern pattern;
    const bool dynamicShift;
    const bool varianceCorrection;
    const bool roundsActivations;  // to 8 bits
    const std::size_t activationBlock;
    const Phase phase;

  private:
    explicit LinearNode(const Attributes& attributes);
    static bool hasActivationBits(const Attributes& attributes);
};

}  // namespace nmexport
