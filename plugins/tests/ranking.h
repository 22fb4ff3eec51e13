#pragma once

#include <cmath>
#include <cstddef>

namespace nmexport::test {

// Whether element a of score x ranks before element b of score y: NaN first, then the larger score;
// of equal ones the earlier element. No two elements rank alike, so a plain sort gives one order.
inline bool ranksBefore(float x, std::size_t a, float y, std::size_t b) {
    if (std::isnan(x) != std::isnan(y)) return std::isnan(x);
    if (x > y || x < y) return x > y;
    return a < b;
}

}  // namespace nmexport::test
