// Selection for a run of tokens: from rows of X to operands and keep masks.
#pragma once

#include <cstddef>
#include <cstdint>

#include "scratch.h"
#include "variant.h"

namespace nmexport {

struct Pattern {
    int n;
    int m;
};

// What selection looks at besides X; every pointer may be null. All but the order itself is by
// position: the place of a channel in the order.
struct SelectionConstants {
    const float* shift = nullptr;                // [shiftCount]
    std::size_t shiftCount = 0;                  // 1 or channels
    const float* scoreScale = nullptr;           // [channels]
    const std::int32_t* channelOrder = nullptr;  // [channels]: position -> channel
    bool dynamicShift = false;
};

// The result's place, for tokens 0 .. count-1.
struct SelectedTokens {
    float* z;  // [count, zStride], by position
    std::size_t zStride;
    std::uint64_t* keep;  // [count, keepStride], bit p = position p is kept
    std::size_t keepStride;
    float* eta;  // [count]
};

constexpr std::size_t keepWords(std::size_t channels) {
    return (channels + 63) / 64;
}

// Selects for `count` tokens whose rows of X start at `x`.
void selectTokens(const Variant& variant, ElementType type, const void* x, std::size_t channels,
                  std::size_t count, Pattern pattern, const SelectionConstants& constants,
                  const SelectedTokens& out);

// The same with every position kept.
void keepTokens(const Variant& variant, ElementType type, const void* x, std::size_t channels,
                std::size_t count, const SelectionConstants& constants, const SelectedTokens& out);

}  // namespace nmexport
