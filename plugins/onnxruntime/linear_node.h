// An NMLinear node's attributes and which inputs fit them, whichever device runs it.
#pragma once

#include "node.h"

namespace nmexport {

class LinearNode {
  public:
    // Throws Fault where an attribute is missing, of another type, or out of range.
    explicit LinearNode(const NodeInfo& node);

    // Throws Fault where W, the shift and its weight do not fit X and the attributes.
    void check(const Inputs& inputs, const Shape& x, const Shape& w) const;
    // Throws Fault where an input or attribute goes with integers and W is of X's type.
    void checkElementWeights(const Inputs& inputs) const;
    // True if the phase leaves the tokens of this X dense.
    bool isExcluded(const Shape& x) const;

    const Pattern pattern;
    const bool dynamicShift;
    const bool varianceCorrection;
    const bool roundsActivations;  // to 8 bits
    const std::size_t activationBlock;

  private:
    enum class Phase { kALL, kPREFILL, kDECODE };

    explicit LinearNode(const Attributes& attributes);
    static Phase phaseOf(const std::string& name);
    static bool hasActivationBits(const Attributes& attributes);

    const Phase mPhase;
};

}  // namespace nmexport
