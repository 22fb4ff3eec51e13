// What an NMLinear node says, whichever device runs it: its attributes and which inputs fit them.
#pragma once

#include "node.h"

namespace nmexport {

class LinearNode {
  public:
    // Throws Fault where an attribute is missing, of another type, or out of range.
    LinearNode(const OrtApi& api, const OrtKernelInfo* info);

    // Throws Fault where W, the shift and its weight do not fit X and the attributes.
    void check(const Inputs& inputs, const Shape& x, const Shape& w) const;
    // Whether the phase leaves tokens of this X dense.
    bool isExcluded(const Shape& x) const;

    const Pattern pattern;
    const bool dynamicShift;
    const bool varianceCorrection;

  private:
    enum class Phase { kALL, kPREFILL, kDECODE };

    explicit LinearNode(const Attributes& attributes);
    static Phase phaseOf(const std::string& name);

    const Phase mPhase;
};

}  // namespace nmexport
