// NMLinear over raw pointers.
//
//   z = x - eta;  s = z where kept;  y = nu * (s @ W) + eta * shiftWeight + bias
//
// A few tokens (decode) stream the kept rows of W from memory; many tokens (prefill) meet packed
// panels of W in the first-level cache. Both give the same bits.
#pragma once

#include "selection.h"
#include "thread_pool.h"

namespace nmexport {

struct LinearArguments {
    ElementType type;
    const void* x;             // [tokens, channels] T
    const void* w;             // [channels, outputs] T, or Int8 where there are weight scales
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
    // Int8 weights: W[k, o] stands for W[k, o] * weightScale[k / (channels / scaleGroups), o].
    const float* weightScale = nullptr;  // [scaleGroups, outputs] or null
    std::size_t scaleGroups = 0;         // divides channels; 1 is a scale an output
    // Position of each channel, [channels], where the rows of W are in the order of positions and
    // have no scales of their own; null where they are in the order of channels.
    const std::int32_t* positions = nullptr;
    const OrderedConstants* ordered = nullptr;  // of `constants`; null: they are ordered each time
};

void nmLinear(const LinearArguments& arguments, const ThreadPool& pool);

}  // namespace nmexport
