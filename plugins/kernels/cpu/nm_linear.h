// NMLinear over raw pointers.
//
//   z = x[order] - eta;  s = valueScale * z where kept
//   y = nu * (s @ W) + eta * shiftWeight + bias
//
// A few tokens (decode) stream the kept rows of W from memory; many tokens (prefill) meet packed
// panels of W in the first-level cache. Both give the same bits.
#pragma once

#include "selection.h"
#include "thread_pool.h"

namespace nmexport {

class GroupScales;

struct LinearArguments {
    ElementType type;
    const void* x;             // [tokens, channels] T
    const void* w;             // [channels, outputs] of weightType, by position; two integers of 4
                               // bits are a byte, the lower output in its low half
    const void* bias;          // [outputs] T or null
    const float* shiftWeight;  // [outputs] or null; used with constants.dynamicShift only
    void* y;                   // [tokens, outputs] T
    std::size_t tokens;
    std::size_t channels;  // K, a multiple of pattern.m
    std::size_t outputs;   // O
    Pattern pattern;
    SelectionConstants constants;
    bool varianceCorrection;
    double varianceFloor;
    bool keepAll;  // the phase excludes these tokens: the dense linear
    // Integers stand for (W[k, o] - weightZero[g, o]) * weightScale[g, o], g being the scale group
    // of row k. Of 4 bits they go with 8 activation bits only.
    WeightType weightType = WeightType::kELEMENT;
    const float* weightScale = nullptr;  // [scaleGroups, outputs], or null where W has no integers
    std::size_t scaleGroups = 0;         // divides channels; 1 is a scale an output
    ZeroPoints zeroPoints = ZeroPoints::kNONE;
    const void* weightZero = nullptr;  // [scaleGroups, outputs] of W's type or float32, or null
    // With 8 activation bits, in place of both where hasScaledRows says so.
    const GroupScales* groupScales = nullptr;
    // 8: kept values are rounded to 8 bits, a scale for each activationBlock positions; 0: they
    // stay.
    int activationBits = 0;
    std::size_t activationBlock = 0;  // a multiple of 16; divides the rows of a scale group
    // Multiplies kept values after selection: neither scores nor nu see it. [channels] by position.
    const float* valueScale = nullptr;
};

void nmLinear(const LinearArguments& arguments, const ThreadPool& pool);

// A copy, side by side, of the constants that selection reads: a decode step comes back to them
// after all other weights have passed through the caches, and then reads them in one go.
//
//   | channelOrder | shift | scoreScale | valueScale |     each from a cache line on, where given
class ConstantsCopy {
  public:
    // Lets the arguments point to the copy, which must outlive them.
    void place(LinearArguments& arguments);
    // Starts to fetch it, before the token to select for is known.
    void prefetch() const;

  private:
    template <typename T>
    const T* append(const T* values, std::size_t count);

    Scratch<std::uint32_t> mMemory;
    std::size_t mUsed = 0;
};

}  // namespace nmexport
