#include "selection.h"

#include <algorithm>

namespace nmexport {

namespace {

// Concatenates the m-bit masks of a token's groups into words.
void joinMasks(const std::uint64_t* masks, std::size_t groups, int m, std::uint64_t* words) {
    std::uint64_t word = 0;
    int used = 0;
    for (std::size_t g = 0; g < groups; ++g) {
        word |= masks[g] << used;
        used += m;
        if (used >= 64) {
            *words++ = word;
            used -= 64;
            word = used > 0 ? masks[g] >> (m - used) : 0;
        }
    }
    if (used > 0) *words = word;
}

void loadTokens(const Variant& variant, ElementType type, const void* x, std::size_t channels,
                std::size_t count, const SelectionConstants& constants, const SelectedTokens& out) {
    const std::size_t rowBytes = channels * elementBytes(type);
    TokenInput token{x,
                     channels,
                     constants.channelOrder,
                     constants.shift,
                     constants.shiftCount,
                     constants.dynamicShift};
    for (std::size_t t = 0; t < count; ++t) {
        token.x = static_cast<const char*>(x) + t * rowBytes;
        out.eta[t] = variant.loadToken[static_cast<int>(type)](token, out.z + t * out.zStride);
    }
}

}  // namespace

void selectTokens(const Variant& variant, ElementType type, const void* x, std::size_t channels,
                  std::size_t count, Pattern pattern, const SelectionConstants& constants,
                  const SelectedTokens& out) {
    thread_local Scratch<std::int32_t> keyScratch;
    thread_local Scratch<std::uint64_t> maskScratch;
    const std::size_t groups = channels / static_cast<std::size_t>(pattern.m);
    std::int32_t* keys = keyScratch.reserve(count * channels);
    std::uint64_t* masks = maskScratch.reserve(count * groups);

    loadTokens(variant, type, x, channels, count, constants, out);
    for (std::size_t t = 0; t < count; ++t) {
        variant.scoreKeys(out.z + t * out.zStride, constants.scoreScale, channels,
                          keys + t * channels);
    }
    variant.selectGroups(keys, count * groups, pattern.n, pattern.m, masks);
    for (std::size_t t = 0; t < count; ++t) {
        joinMasks(masks + t * groups, groups, pattern.m, out.keep + t * out.keepStride);
    }
}

void keepTokens(const Variant& variant, ElementType type, const void* x, std::size_t channels,
                std::size_t count, const SelectionConstants& constants, const SelectedTokens& out) {
    loadTokens(variant, type, x, channels, count, constants, out);
    for (std::size_t t = 0; t < count; ++t) {
        std::uint64_t* words = out.keep + t * out.keepStride;
        for (std::size_t i = 0; i < channels / 64; ++i) words[i] = ~std::uint64_t{0};
        if (channels % 64 != 0) words[channels / 64] = (std::uint64_t{1} << channels % 64) - 1;
    }
}

}  // namespace nmexport
