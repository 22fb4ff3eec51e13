#include "weight_copy.h"

#include <cstring>

#include "contract.h"
#include "huge_pages.h"

namespace nmexport {

WeightCopy::WeightCopy(const InputShapes& shapes, std::size_t elementBytes,
                       std::size_t columnsPerByte) {
    const Shape* shape = shapes.constantShape(NMLinearInput::W);
    if (shape == nullptr || shape->size() != 2) return;
    const std::size_t bytes = static_cast<std::size_t>(shape->front()) *
                              static_cast<std::size_t>(shape->back()) * elementBytes /
                              columnsPerByte;
    const void* given = shapes.constantData(NMLinearInput::W);
    mRows = hugePages(bytes);
    if (mRows == nullptr) return;
    std::memcpy(mRows.get(), given, bytes);
    pageOut(given, bytes);
}

}  // namespace nmexport
