// Scales of groups of channels, and their zero points in floating point, as
// products in integers read them: a record for each step of each group, in the
// order of the step's sums.
//
//   group 0 | step 0: scales, zero points | step 1: scales, zero points | ...
//   group 1 | ...
//
// They are a good part of what a token reads: whatever it keeps, it needs all
// of them. Those of an imported checkpoint are halves, whatever type X has.
// Where none loses a bit they are read as such; so are the minima that zero
// points came of, where each is the minimum over its scale.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "dots.h"

namespace nmexport {

class GroupScales {
  public:
    // Memory for so many bytes, aligned to a cache line.
    using Allocate = std::shared_ptr<char> (*)(std::size_t bytes);

    // `scales` and, where the points are floats, `zeros`: [groups, outputs].
    // Other zero points stay where they are.
    GroupScales(const DotKernels& kernels, WeightType type, std::size_t groups, std::size_t outputs,
                const float* scales, ZeroPoints points, const float* zeros, Allocate allocate);

    const DotKernels& kernels() const { return mKernels; }
    bool areHalves() const { return mAreHalves; }
    // Records and zero points from a column on that begins a step.
    void place(std::size_t column, IntegerWeights& weights) const;

  private:
    // One of scales and zero points, put into the records.
    void write(const float* values, std::size_t place);

    const DotKernels& mKernels;
    const IntegerFormat mFormat;
    const std::size_t mGroups;
    const std::size_t mOutputs;
    const std::size_t mColumns;  // of a step
    const std::size_t mSteps;
    ZeroPoints mPoints;
    bool mAreHalves;
    std::size_t mRecordBytes;
    std::shared_ptr<char> mRecords;
};

}  // namespace nmexport
