#include "nm_prune.h"

#include <algorithm>

namespace nmexport {

namespace {

constexpr std::size_t kTOKENS_PER_TASK = 8;

template <typename Bits>
void writeKept(const PruneArguments& a, std::size_t token, const std::uint64_t* keep) {
    const Bits* x = static_cast<const Bits*>(a.x) + token * a.channels;
    Bits* y = static_cast<Bits*>(a.y) + token * a.channels;
    for (std::size_t p = 0; p < a.channels; ++p) {
        const std::size_t k =
            a.channelOrder == nullptr ? p : static_cast<std::size_t>(a.channelOrder[p]);
        y[k] = (keep[p / 64] >> (p % 64) & 1) != 0 ? x[k] : Bits{0};
    }
}

void pruneTokens(const Variant& variant, const PruneArguments& a,
                 const SelectionConstants& constants, std::size_t first, std::size_t count) {
    thread_local Scratch<float> zScratch;
    thread_local Scratch<std::uint64_t> keepScratch;
    float eta[kTOKENS_PER_TASK];
    const std::size_t words = keepWords(a.channels);
    const SelectedTokens selected{zScratch.reserve(count * a.channels), a.channels,
                                  keepScratch.reserve(count * words), words, eta};
    const char* x = static_cast<const char*>(a.x) + first * a.channels * elementBytes(a.type);
    selectTokens(variant, a.type, x, a.channels, count, a.pattern, constants, selected);
    for (std::size_t t = 0; t < count; ++t) {
        const std::uint64_t* keep = selected.keep + t * words;
        if (elementBytes(a.type) == 4) {
            writeKept<std::uint32_t>(a, first + t, keep);
        } else {
            writeKept<std::uint16_t>(a, first + t, keep);
        }
    }
}

}  // namespace

void nmPrune(const PruneArguments& a, const ThreadPool& pool) {
    const Variant& variant = activeVariant();
    SelectionConstants constants;
    constants.scoreScale = a.scoreScale;
    constants.channelOrder = a.channelOrder;
    const std::size_t tasks = (a.tokens + kTOKENS_PER_TASK - 1) / kTOKENS_PER_TASK;
    parallelFor(pool, tasks, [&](std::size_t task) {
        const std::size_t first = task * kTOKENS_PER_TASK;
        pruneTokens(variant, a, constants, first, std::min(kTOKENS_PER_TASK, a.tokens - first));
    });
}

}  // namespace nmexport
