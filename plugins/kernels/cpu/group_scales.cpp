#include "group_scales.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

namespace nmexport {

namespace {

Float16 halfOf(float value) {
    Float16 half{0};
    fromFloat(value, &half);
    return half;
}

bool isHalf(float value) {
    return bitsOf(toFloat(halfOf(value))) == bitsOf(value);
}

// A zero point that came of a minimum in float16 is that minimum over its
// scale, rounded once.
bool comesOfHalf(float zero, float scale) {
    if (scale == 0.0f) return std::isfinite(zero);
    return bitsOf(toFloat(halfOf(zero * scale)) / scale) == bitsOf(zero);
}

bool allHalves(std::size_t count, const float* scales, const float* zeros) {
    for (std::size_t i = 0; i < count; ++i) {
        if (!isHalf(scales[i]) || (zeros != nullptr && !comesOfHalf(zeros[i], scales[i]))) {
            return false;
        }
    }
    return true;
}

}  // namespace

GroupScales::GroupScales(const DotKernels& kernels, WeightType type, std::size_t groups,
                         std::size_t outputs, const float* scales, ZeroPoints points,
                         const float* zeros, Allocate allocate)
    : mKernels(kernels),
      mFormat(integerFormatOf(type)),
      mGroups(groups),
      mOutputs(outputs),
      mColumns(columnsOfStep(mFormat, kernels.stepBytes)),
      mSteps((outputs + mColumns - 1) / mColumns),
      mPoints(points),
      mAreHalves(allHalves(groups * outputs, scales, zeros)) {
    const std::size_t elementBytes = mAreHalves ? sizeof(Float16) : sizeof(float);
    mRecordBytes = (zeros == nullptr ? 1 : 2) * mColumns * elementBytes;
    mRecords = allocate(mGroups * mSteps * mRecordBytes);
    write(scales, 0);
    if (zeros == nullptr) return;
    if (!mAreHalves) {
        write(zeros, 1);
        return;
    }
    mPoints = ZeroPoints::kMINIMA;
    std::vector<float> minima(groups * outputs);
    for (std::size_t i = 0; i < minima.size(); ++i) minima[i] = zeros[i] * scales[i];
    write(minima.data(), 1);
}

void GroupScales::place(std::size_t column, IntegerWeights& weights) const {
    weights.records = mRecords.get() + column / mColumns * mRecordBytes;
    weights.recordBytes = mRecordBytes;
    weights.groupBytes = mSteps * mRecordBytes;
    weights.zeroPoints = mPoints;
}

void GroupScales::write(const float* values, std::size_t place) {
    const std::size_t elementBytes = mAreHalves ? sizeof(Float16) : sizeof(float);
    std::vector<float> row(mSteps * mColumns);
    for (std::size_t group = 0; group < mGroups; ++group) {
        std::copy_n(values + group * mOutputs, mOutputs, row.begin());
        std::fill(row.begin() + static_cast<std::ptrdiff_t>(mOutputs), row.end(), 0.0f);
        mKernels.arrange[static_cast<int>(mFormat)](row.data(), row.size());
        for (std::size_t step = 0; step < mSteps; ++step) {
            char* to = mRecords.get() + (group * mSteps + step) * mRecordBytes +
                       place * mColumns * elementBytes;
            const float* from = row.data() + step * mColumns;
            if (!mAreHalves) {
                std::memcpy(to, from, mColumns * sizeof(float));
                continue;
            }
            for (std::size_t i = 0; i < mColumns; ++i) {
                const std::uint16_t bits = halfOf(from[i]).bits;
                std::memcpy(to + i * sizeof bits, &bits, sizeof bits);
            }
        }
    }
}

}  // namespace nmexport
