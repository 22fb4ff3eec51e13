// NMPrune over raw pointers.
#pragma once

#include "selection.h"
#include "thread_pool.h"

namespace nmexport {

struct PruneArguments {
    ElementType type;
    const void* x;  // [tokens, channels] T
    void* y;        // [tokens, channels] T: x where kept, zero elsewhere
    std::size_t tokens;
    std::size_t channels;  // a multiple of pattern.m
    Pattern pattern;
    const float* scoreScale;           // [channels] by position, or null
    const std::int32_t* channelOrder;  // [channels], a permutation, or null
};

void nmPrune(const PruneArguments& arguments, const ThreadPool& pool);

}  // namespace nmexport
