#include "stored_weights.h"

#include <cstdlib>
#include <cstring>
#include <new>

#include "huge_pages.h"
#include "stored_shapes.h"

namespace nmexport {

namespace Input = NMLinearInput;

namespace {

// A block divides K, and a scale group where there are several.
void checkBlock(const LinearNode& node, const Shape& w, const Shape& scales) {
    const std::int64_t block = static_cast<std::int64_t>(node.activationBlock);
    if (block % kSCALE_GROUP == 0 && w[0] / scales[0] % block == 0) return;
    throw Fault(shapesOf(kNMLinear.name, w, scales) + "; activation_block is " +
                std::to_string(block) + "; allowed: a multiple of " + std::to_string(kSCALE_GROUP) +
                " that divides K / G = " + std::to_string(w[0] / scales[0]));
}

std::shared_ptr<char> ordinaryPages(std::size_t bytes) {
    void* memory =
        std::aligned_alloc(kALIGNMENT, (bytes + kALIGNMENT - 1) / kALIGNMENT * kALIGNMENT);
    if (memory == nullptr) throw std::bad_alloc();
    return {static_cast<char*>(memory), std::free};
}

std::shared_ptr<char> pages(std::size_t bytes) {
    std::shared_ptr<char> memory = hugePages(bytes);
    return memory == nullptr ? ordinaryPages(bytes) : memory;
}

// The integer at an index of a tensor of integers of 4 bits.
int nibbleAt(const std::uint8_t* bytes, std::size_t index, bool isSigned) {
    const int bits = bytes[index / 2] >> (index % 2 * 4) & 15;
    return isSigned ? (bits ^ 8) - 8 : bits;
}

}  // namespace

WeightType weightTypeOf(ONNXTensorElementDataType type) {
    switch (type) {
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8:
            return WeightType::kINT8;
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT4:
            return WeightType::kINT4;
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT4:
            return WeightType::kUINT4;
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT8E4M3FN:
            throw Fault(
                "NMLinear: W is of type float8e4m3fn, which the CPU has no kernel for; allowed: "
                "int8, int4, uint4 or X's type, or run the model without the custom op library");
        default:
            return WeightType::kELEMENT;
    }
}

StoredWeights::StoredWeights(const Inputs& inputs, const LinearNode& node, StoredTypes types,
                             const Shape& w, bool usesHugePages)
    : mType(weightTypeOf(types.weights)),
      mGiven(inputs.data(Input::W)),
      mBlock(node.roundsActivations ? node.activationBlock : 0) {
    const Shape scales =
        inputs.has(Input::weight_scale) ? inputs.shape(Input::weight_scale) : Shape{};
    const bool isNibbles = mType != WeightType::kINT8;
    const bool hasZeros = inputs.has(Input::weight_zero_point);
    const Shape points = hasZeros ? inputs.shape(Input::weight_zero_point) : Shape{};
    checkStored(kNMLinear.name, w, scales, hasZeros ? &points : nullptr, isNibbles);
    if (mBlock != 0) checkBlock(node, w, scales);

    mGroups = static_cast<std::size_t>(scales[0]);
    const std::size_t outputs = static_cast<std::size_t>(w[1]);
    takeScales(inputs.data(Input::weight_scale), types.scales, mGroups * outputs);
    const void* zeros = inputs.data(Input::weight_zero_point);
    const bool widens = mBlock == 0 && isNibbles;
    const bool isStep = types.zeros != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    if (widens) widen(static_cast<std::size_t>(w[0]), outputs, isStep ? zeros : nullptr);
    if (zeros != nullptr && !(widens && isStep)) takeZeros(zeros, isStep, mGroups * outputs);
    if (mBlock == 0 || (mGroups == 1 && mZeroPoints != ZeroPoints::kFLOATS)) return;
    mGroupScales = std::make_unique<GroupScales>(
        activeDots(), mType, mGroups, outputs, mScales.data(), mZeroPoints,
        mZeroPoints == ZeroPoints::kFLOATS ? mZeros.data() : nullptr,
        usesHugePages ? pages : ordinaryPages);
    mScales = {};
    mZeros = {};
}

void StoredWeights::takeScales(const void* given, ONNXTensorElementDataType type,
                               std::size_t count) {
    mScales.resize(count);
    if (type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) {
        std::memcpy(mScales.data(), given, count * sizeof(float));
        return;
    }
    const std::uint16_t* bits = static_cast<const std::uint16_t*>(given);
    for (std::size_t i = 0; i < count; ++i) {
        mScales[i] = type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 ? toFloat(Float16{bits[i]})
                                                                   : toFloat(BFloat16{bits[i]});
    }
}

// Products in integers take zero points as W holds them; those in floating point, float32.
void StoredWeights::takeZeros(const void* given, bool areSteps, std::size_t count) {
    if (areSteps && mBlock != 0) {
        mZeroPoints = ZeroPoints::kINTEGERS;
        mGivenZeros = given;
        return;
    }
    mZeroPoints = ZeroPoints::kFLOATS;
    mZeros.resize(count);
    if (!areSteps) {
        std::memcpy(mZeros.data(), given, count * sizeof(float));
        return;
    }
    const std::int8_t* integers = static_cast<const std::int8_t*>(given);
    for (std::size_t i = 0; i < count; ++i) mZeros[i] = static_cast<float>(integers[i]);
}

void StoredWeights::widen(std::size_t rows, std::size_t columns, const void* integerZeros) {
    const std::uint8_t* given = static_cast<const std::uint8_t*>(mGiven);
    const std::uint8_t* zeros = static_cast<const std::uint8_t*>(integerZeros);
    const bool isSigned = mType == WeightType::kINT4;
    mWide.resize(rows * columns);
    for (std::size_t i = 0; i < mWide.size(); ++i) {
        const std::size_t group = i / columns / (rows / mGroups);
        const int zero =
            zeros == nullptr ? 0 : nibbleAt(zeros, group * columns + i % columns, isSigned);
        mWide[i] = static_cast<std::int8_t>(nibbleAt(given, i, isSigned) - zero);
    }
    mType = WeightType::kINT8;
}

void StoredWeights::place(LinearArguments& a) const {
    a.w = mWide.empty() ? mGiven : mWide.data();
    a.weightType = mType;
    a.weightScale = mScales.data();
    a.scaleGroups = mGroups;
    a.zeroPoints = mZeroPoints;
    a.weightZero = mZeros.empty() ? mGivenZeros : mZeros.data();
    a.groupScales = mGroupScales.get();
    a.activationBits = mBlock != 0 ? 8 : 0;
    a.activationBlock = mBlock;
}

}  // namespace nmexport
