#include "stored_shapes.h"

#include "node.h"

namespace nmexport {

namespace {

bool fits(const Shape& w, const Shape& scales) {
    return scales.size() == 2 && scales[1] == w[1] && scales[0] >= 1 && w[0] % scales[0] == 0 &&
           (scales[0] == 1 || w[0] / scales[0] % kSCALE_GROUP == 0);
}

}  // namespace

std::string shapesOf(const char* op, const Shape& w, const Shape& scales) {
    return std::string(op) + ": W has shape " + textOf(w) + " and weight_scale " + textOf(scales);
}

void checkStored(const char* op, const Shape& w, const Shape& scales, const Shape* zeros,
                 bool isNibbles) {
    if (!fits(w, scales)) {
        throw Fault(shapesOf(op, w, scales) +
                    "; allowed: [1, O], or [G, O] with K / G a multiple of " +
                    std::to_string(kSCALE_GROUP));
    }
    if (zeros != nullptr && *zeros != scales) {
        throw Fault(shapesOf(op, w, scales) + "; weight_zero_point has shape " + textOf(*zeros) +
                    "; allowed: that of weight_scale");
    }
    if (isNibbles && w[1] % 2 != 0) {
        throw Fault(shapesOf(op, w, scales) + "; allowed: an even O for integers of 4 bits");
    }
}

}  // namespace nmexport
