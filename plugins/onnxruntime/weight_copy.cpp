#include "weight_copy.h"

#include <cstring>

#include "contract.h"
#include "huge_pages.h"

namespace nmexport {

namespace {

namespace Input = NMLinearInput;

bool isConstant(const InputShapes& shapes, int input, std::size_t rank) {
    const Shape* shape = shapes.constantShape(input);
    return shape != nullptr && shape->size() == rank;
}

// The order that rows are copied in; null where that is the channels' own: rows that share scales
// must follow each other.
const std::int32_t* rowOrder(const InputShapes& shapes, std::size_t channels) {
    if (!isConstant(shapes, Input::channel_order, 1)) return nullptr;
    const Shape* scales = shapes.constantShape(Input::weight_scale);
    if (scales != nullptr && !scales->empty() && scales->front() > 1) return nullptr;
    const bool fits =
        shapes.constantShape(Input::channel_order)->front() == static_cast<std::int64_t>(channels);
    return fits ? static_cast<const std::int32_t*>(shapes.constantData(Input::channel_order))
                : nullptr;
}

}  // namespace

WeightCopy::WeightCopy(const InputShapes& shapes, std::size_t elementBytes) {
    if (!isConstant(shapes, Input::W, 2)) return;
    const std::size_t channels = static_cast<std::size_t>(shapes.constantShape(Input::W)->front());
    const std::size_t rowBytes =
        static_cast<std::size_t>(shapes.constantShape(Input::W)->back()) * elementBytes;
    const char* given = static_cast<const char*>(shapes.constantData(Input::W));
    mRows = hugePages(channels * rowBytes);
    if (mRows == nullptr) return;
    const std::int32_t* order = rowOrder(shapes, channels);
    if (order == nullptr) {
        std::memcpy(mRows.get(), given, channels * rowBytes);
    } else {
        mPositions.resize(channels);
        for (std::size_t p = 0; p < channels; ++p) {
            const std::size_t channel = static_cast<std::size_t>(order[p]);
            mPositions[channel] = static_cast<std::int32_t>(p);
            std::memcpy(mRows.get() + p * rowBytes, given + channel * rowBytes, rowBytes);
        }
    }
    pageOut(given, channels * rowBytes);
}

void WeightCopy::place(LinearArguments& arguments) const {
    if (mRows == nullptr) return;
    arguments.w = mRows.get();
    arguments.positions = mPositions.empty() ? nullptr : mPositions.data();
}

}  // namespace nmexport
