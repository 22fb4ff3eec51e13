// Which scales and zero points fit a W of integers or 8-bit floats, whichever device reads them.
#pragma once

#include "ort_api.h"

namespace nmexport {

// How an op says which shapes it was given: "NMLinear: W has shape [..] and weight_scale [..]".
std::string shapesOf(const char* op, const Shape& w, const Shape& scales);

// Throws Fault unless W is [K, O], scales are [1, O], or [G, O] with groups of a multiple of 16
// rows, zero points (null: none) have that shape too, and O is even where two values share a byte.
void checkStored(const char* op, const Shape& w, const Shape& scales, const Shape* zeros,
                 bool isNibbles);

}  // namespace nmexport
