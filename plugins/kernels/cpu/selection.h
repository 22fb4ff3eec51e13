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

// What selection looks at besides X; every pointer may be null. Values of channels are by channel,
// or by position where it says so.
struct SelectionConstants {
    const float* shift = nullptr;                // [shiftCount]
    std::size_t shiftCount = 0;                  // 1 or channels
    const float* scoreScale = nullptr;           // [channels]
    const std::int32_t* channelOrder = nullptr;  // [channels]
    bool dynamicShift = false;
};

// A copy of what selection reads, by position and side by side: a decode step comes back to it
// after all other weights have passed through the caches, and then reads it in one go.
class OrderedConstants {
  public:
    // `byChannel` may go away afterwards.
    void assign(const SelectionConstants& byChannel, std::size_t channels);
    const SelectionConstants& byPosition() const { return mByPosition; }
    // Starts to fetch it, before the token to select for is known.
    void prefetch() const;

  private:
    float* append(const float* byChannel, const std::int32_t* order, std::size_t channels);

    Scratch<float> mMemory;
    std::size_t mUsed = 0;
    SelectionConstants mByPosition;
};

// By position: `ordered` where it is there, else what this thread orders now and keeps until its
// next call.
SelectionConstants orderedConstants(const SelectionConstants& byChannel,
                                    const OrderedConstants* ordered, std::size_t channels);

// Where the result goes, for tokens 0 .. count-1.
struct SelectedTokens {
    float* z;  // [count, zStride], position order
    std::size_t zStride;
    std::uint64_t* keep;  // [count, keepStride], bit p = position p is kept
    std::size_t keepStride;
    float* eta;  // [count]
};

constexpr std::size_t keepWords(std::size_t channels) {
    return (channels + 63) / 64;
}

// Selects for `count` tokens whose rows of X start at `x`. The constants are by position.
void selectTokens(const Variant& variant, ElementType type, const void* x, std::size_t channels,
                  std::size_t count, Pattern pattern, const SelectionConstants& constants,
                  const SelectedTokens& out);

// The same with every position kept.
void keepTokens(const Variant& variant, ElementType type, const void* x, std::size_t channels,
                std::size_t count, const SelectionConstants& constants, const SelectedTokens& out);

}  // namespace nmexport
