// Integers in W with their scales and zero points: checked, and in the form that kernels read.
#pragma once

#include <memory>
#include <vector>

#include "custom_op.h"
#include "group_scales.h"
#include "linear_node.h"
#include "nm_linear.h"

namespace nmexport {

// Throws Fault where the CPU has no kernel for weights of the type.
WeightType weightTypeOf(ONNXTensorElementDataType type);

class StoredWeights {
  public:
    StoredWeights() = default;
    // Throws Fault where W, its scales, its zero points and the attributes do not fit each other.
    // With huge pages the scales of groups lie in such, too.
    StoredWeights(const Inputs& inputs, const LinearNode& node, StoredTypes types, const Shape& w,
                  bool usesHugePages);

    // Lets the arguments point to it, which must outlive them.
    void place(LinearArguments& arguments) const;

  private:
    void takeScales(const void* given, ONNXTensorElementDataType type, std::size_t count);
    // `areSteps`: of W's type, else float32.
    void takeZeros(const void* given, bool areSteps, std::size_t count);
    void widen(std::size_t rows, std::size_t columns, const void* integerZeros);

    WeightType mType = WeightType::kELEMENT;
    const void* mGiven = nullptr;  // W as the session holds it
    ZeroPoints mZeroPoints = ZeroPoints::kNONE;
    const void* mGivenZeros = nullptr;  // where they are read as the session holds them
    std::size_t mGroups = 1;
    std::size_t mBlock = 0;      // of activations in 8 bits, else 0
    std::vector<float> mScales;  // [groups, outputs], where not in mGroupScales
    std::vector<float> mZeros;   // the same
    std::unique_ptr<const GroupScales> mGroupScales;
    std::vector<std::int8_t> mWide;  // W where it was widened, less integer zero points
};

}  // namespace nmexport
