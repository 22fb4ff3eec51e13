// Index arithmetic of the static work split. Pure functions, the same on host and device.
#pragma once

#include "selection.cuh"

namespace nmexport::cuda {

//! Half-open range of units.
struct Range {
    int32_t begin;
    int32_t end;
};

//! Part `index` of `parts` nearly equal parts of [0, total): sizes differ by at most one, order is
//! kept.
NM_HOST_DEVICE Range splitRange(int32_t total, int32_t parts, int32_t index) {
    int64_t const whole = total;
    return {static_cast<int32_t>(whole * index / parts),
            static_cast<int32_t>(whole * (index + 1) / parts)};
}

//! Elements that one warp ranks at a time: whole groups, at most 32 elements, or one group where
//! m is above 32.
NM_HOST_DEVICE int32_t chunkWidth(int32_t m) {
    return m > 32 ? m : 32 / m * m;
}

NM_HOST_DEVICE int32_t ceilDivide(int32_t a, int32_t b) {
    return (a + b - 1) / b;
}

}  // namespace nmexport::cuda
