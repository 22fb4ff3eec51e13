// The attribute `phase`: which tokens are sparse.
#pragma once

#include <string>

#include "ort_api.h"

namespace nmexport {

class Phase {
  public:
    // Any name but "prefill" and "decode" is all tokens.
    explicit Phase(const std::string& name)
        : mRule(name == "decode"    ? Rule::kDECODE
                : name == "prefill" ? Rule::kPREFILL
                                    : Rule::kALL) {}

    bool isAll() const { return mRule == Rule::kALL; }
    // True if the tokens of X stay dense. The sequence length is the second-to-last dimension; a
    // lone token is a sequence of one.
    bool excludes(const Shape& x) const {
        const bool isPrompt = x.size() >= 2 && x[x.size() - 2] != 1;
        return mRule == Rule::kDECODE ? isPrompt : mRule == Rule::kPREFILL && !isPrompt;
    }

  private:
    enum class Rule { kALL, kPREFILL, kDECODE };

    Rule mRule;
};

}  // namespace nmexport
