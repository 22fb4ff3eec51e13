#include "nm_linear.h"

#include <algorithm>
#include <cstring>

#include "linear_pass.h"

namespace nmexport {

namespace {

// Operands of one pass stay within the second- or third-level cache.
constexpr std::size_t kPASS_BYTES = std::size_t{8} << 20;
constexpr std::size_t kMIN_PASS_TOKENS = 64;
// Decode, with up to this many tokens (measured).
constexpr std::size_t kFEW_TOKENS = 6;
// Prefill: tokens of a task; their sums stay in the second-level cache.
constexpr std::size_t kMIN_PANEL_TOKENS = 32;
constexpr std::size_t kMAX_PANEL_TOKENS = 512;

std::size_t weightType(const LinearArguments& a) {
    return a.weightType == WeightType::kINT8 ? kINT8_WEIGHTS : static_cast<std::size_t>(a.type);
}

WeightScales scalesFrom(const LinearArguments& a, std::size_t column) {
    if (!hasScaledRows(a)) return {};
    const float* zeros = static_cast<const float*>(a.weightZero);
    return {a.weightScale + column, a.channels / a.scaleGroups,
            zeros == nullptr ? nullptr : zeros + column};
}

auto rowProductOf(const LinearArguments& a, const Variant& variant) {
    if (!hasScaledRows(a)) return variant.rowProduct[weightType(a)];
    return a.weightZero == nullptr ? variant.scaledRowProduct : variant.shiftedRowProduct;
}

auto panelProductOf(const LinearArguments& a, const Variant& variant) {
    if (!hasScaledRows(a)) return variant.panelProduct[weightType(a)];
    return a.weightZero == nullptr ? variant.scaledPanelProduct : variant.shiftedPanelProduct;
}

const char* weightsFrom(const LinearArguments& a, std::size_t column) {
    return static_cast<const char*>(a.w) + rowBytes(a, column);
}

// The kept values of each token of a pass, as lists that are multiplied a slice at a time.
struct KeptLists {
    std::int32_t* rows;  // [tokens, stride]
    float* values;       // the same
    std::size_t stride;
    std::size_t* ends;  // [tokens, slices]: rows kept up to the end of each slice
    std::size_t slices;
};

// A slice's part of a tile comes from memory for the first token that keeps it, and to the others
// from the second-level cache. A lone token has nothing to share.
KeptLists listKept(const LinearArguments& a, const Variant& variant, const Pass& pass) {
    thread_local Scratch<std::int32_t> rowScratch;
    thread_local Scratch<float> valueScratch;
    thread_local Scratch<std::size_t> endScratch;
    KeptLists lists;
    lists.stride = a.channels + variant.lanes;
    lists.rows = rowScratch.reserve(pass.tokens * lists.stride);
    lists.values = valueScratch.reserve(pass.tokens * lists.stride);
    lists.slices = pass.tokens == 1 ? 1 : keepWords(a.channels);
    lists.ends = endScratch.reserve(pass.tokens * lists.slices);
    for (std::size_t t = 0; t < pass.tokens; ++t) {
        const std::uint64_t* keep = pass.selected.keep + t * pass.selected.keepStride;
        std::size_t* ends = lists.ends + t * lists.slices;
        const std::size_t count =
            variant.listKept({pass.selected.z + t * pass.selected.zStride, keep, a.channels,
                              lists.rows + t * lists.stride, lists.values + t * lists.stride});
        std::size_t end = 0;
        for (std::size_t slice = 0; slice + 1 < lists.slices; ++slice) {
            end += static_cast<std::size_t>(__builtin_popcountll(keep[slice]));
            ends[slice] = end;
        }
        ends[lists.slices - 1] = count;
    }
    return lists;
}

void multiplyTile(const LinearArguments& a, const Variant& variant, const Pass& pass,
                  const KeptLists& lists, std::size_t begin, std::size_t end) {
    thread_local Scratch<float> sumScratch;
    const std::size_t columns = end - begin;
    const std::size_t stride = divideUp(columns, variant.lanes) * variant.lanes;
    float* sums = sumScratch.reserve(pass.tokens * stride);
    const auto multiply = rowProductOf(a, variant);
    RowProduct product{};
    product.w = weightsFrom(a, begin);
    product.rowStride = a.outputs;
    product.columns = columns;
    product.scales = scalesFrom(a, begin);
    product.ahead = cacheAhead();
    prefetchBias(a, begin, end);
    for (std::size_t slice = 0; slice < lists.slices; ++slice) {
        for (std::size_t t = 0; t < pass.tokens; ++t) {
            const std::size_t* ends = lists.ends + t * lists.slices;
            product.rows = lists.rows + t * lists.stride;
            product.values = lists.values + t * lists.stride;
            product.count = ends[lists.slices - 1];
            product.begin = slice == 0 ? 0 : ends[slice - 1];
            product.end = ends[slice];
            product.sums = sums + t * stride;
            multiply(product);
        }
    }
    for (std::size_t t = 0; t < pass.tokens; ++t) {
        Epilogue epilogue = epilogueOf(a, pass.first + t, begin, columns);
        epilogue.sums = sums + t * stride;
        epilogue.factors = {pass.nu[t], pass.selected.eta[t]};
        variant.epilogue[static_cast<int>(a.type)](epilogue);
    }
}

// Decode. A task owns tiles of columns and reads their part of every row that a token keeps:
//
//              columns 0 .. O
//   kept row | tile 0 | tile 1 |      no sum is shared, so no reduction and no order to fix
//   kept row | tile 0 | tile 1 |
//
// Each task selects for itself: that takes no longer than waiting for another to do it, and the
// threads start together.
void multiplyFew(const LinearArguments& a, const Variant& variant, std::size_t first,
                 std::size_t tokens, const ThreadPool& pool) {
    const Cut cut = cutOf(a, tokens, tokens * keptRows(a) * rowBytes(a, a.outputs), pool);
    const std::size_t units = divideUp(a.outputs, variant.lanes);
    parallelFor(pool, cut.tasks, [&](std::size_t task) {
        const Pass pass = passOf(a, variant, first, tokens);
        select(a, variant, pass);
        const KeptLists lists = listKept(a, variant, pass);
        const std::size_t last = cut.tiles * (task + 1) / cut.tasks;
        for (std::size_t tile = cut.tiles * task / cut.tasks; tile < last; ++tile) {
            const std::size_t begin = units * tile / cut.tiles * variant.lanes;
            const std::size_t end =
                std::min(units * (tile + 1) / cut.tiles * variant.lanes, a.outputs);
            if (begin < end) multiplyTile(a, variant, pass, lists, begin, end);
        }
    });
}

// Panels of equal width, or nearly. One more than there must be costs less than shorter runs.
std::size_t panelsOf(std::size_t units, std::size_t threads) {
    const std::size_t least = divideUp(units, kPANEL_VECTORS);
    const bool evens = threads > 1 && !isEven(least, threads) && isEven(least + 1, threads);
    return evens && least < units ? least + 1 : least;
}

// Tokens of a task where there are `panels` panels. Fewer, longer runs pack W less often.
std::size_t tokensOfRun(std::size_t tokens, std::size_t panels, std::size_t threads) {
    const std::size_t most = divideUp(tokens, kMIN_PANEL_TOKENS);
    std::size_t runs = divideUp(tokens, kMAX_PANEL_TOKENS);
    while (runs < most && threads > 1 && !isEven(panels * runs, threads)) ++runs;
    return divideUp(tokens, runs);
}

// The kept values of a prompt's tokens, for all threads to read.
struct Prompt {
    std::size_t first;
    std::size_t tokens;
    float* kept;  // see PanelProduct
    std::size_t keptStride;
    std::uint64_t* keep;
    TokenFactors* factors;  // [tokens]
};

// Room for what a token keeps of a block, in whole vectors. A block meets the ends of two groups at
// most besides whole ones.
std::size_t keptStrideOf(const LinearArguments& a, const Variant& variant) {
    if (keepsAll(a)) return kBLOCK;
    const std::size_t m = static_cast<std::size_t>(a.pattern.m);
    const std::size_t groups = kBLOCK / m + (kBLOCK % m == 0 ? 0 : 2);
    const std::size_t most = std::min(groups * static_cast<std::size_t>(a.pattern.n), kBLOCK);
    return divideUp(most, variant.lanes) * variant.lanes;
}

// Scratch of this thread for a prompt.
Prompt promptOf(const LinearArguments& a, const Variant& variant, std::size_t first,
                std::size_t tokens) {
    thread_local Scratch<float> keptScratch;
    thread_local Scratch<std::uint64_t> keepScratch;
    thread_local Scratch<TokenFactors> factorScratch;
    const std::size_t blocks = keepWords(a.channels);
    Prompt prompt;
    prompt.first = first;
    prompt.tokens = tokens;
    prompt.keptStride = keptStrideOf(a, variant);
    prompt.kept = keptScratch.reserve(blocks * tokens * prompt.keptStride);
    prompt.keep = keepScratch.reserve(blocks * tokens);
    prompt.factors = factorScratch.reserve(tokens);
    return prompt;
}

// Selects for some tokens of the prompt.
void selectOf(const LinearArguments& a, const Variant& variant, const Prompt& prompt,
              std::size_t begin, std::size_t count) {
    const Pass pass = passOf(a, variant, prompt.first + begin, count);
    select(a, variant, pass);
    for (std::size_t t = 0; t < count; ++t) {
        prompt.factors[begin + t] = {pass.nu[t], pass.selected.eta[t]};
        variant.cutKept({pass.selected.z + t * pass.selected.zStride,
                         pass.selected.keep + t * pass.selected.keepStride, a.channels,
                         prompt.kept + (begin + t) * prompt.keptStride, prompt.keptStride,
                         prompt.keep + begin + t, prompt.tokens});
    }
}

// Prefill. A task owns a panel of columns and a run of tokens.
void multiplyPanels(const LinearArguments& a, const Variant& variant, const Prompt& prompt,
                    const ThreadPool& pool) {
    const std::size_t width = kPANEL_VECTORS * variant.lanes;
    const std::size_t units = divideUp(a.outputs, variant.lanes);
    const std::size_t panels = panelsOf(units, pool.threads);
    const std::size_t runTokens = tokensOfRun(prompt.tokens, panels, pool.threads);
    const std::size_t runs = divideUp(prompt.tokens, runTokens);
    parallelFor(pool, panels * runs, [&](std::size_t task) {
        thread_local Scratch<float> packedScratch;
        thread_local Scratch<float> sumScratch;
        const std::size_t panel = task / runs;
        const std::size_t begin = units * panel / panels * variant.lanes;
        const std::size_t end = std::min(units * (panel + 1) / panels * variant.lanes, a.outputs);
        const std::size_t first = task % runs * runTokens;
        PanelProduct product;
        product.w = weightsFrom(a, begin);
        product.rowStride = a.outputs;
        product.channels = a.channels;
        product.kept = prompt.kept + first * prompt.keptStride;
        product.keptStride = prompt.keptStride;
        product.keep = prompt.keep + first;
        product.blockTokens = prompt.tokens;
        product.tokens = std::min(runTokens, prompt.tokens - first);
        product.columns = end - begin;
        product.packed = packedScratch.reserve(kBLOCK * width);
        product.sums = sumScratch.reserve(kMAX_PANEL_TOKENS * width);
        product.scales = scalesFrom(a, begin);
        product.finish = variant.epilogue[static_cast<int>(a.type)];
        product.epilogue = epilogueOf(a, prompt.first + first, begin, end - begin);
        product.factors = prompt.factors + first;
        product.yStride = a.outputs * elementBytes(a.type);
        product.yBytes = product.columns * elementBytes(a.type);
        panelProductOf(a, variant)(product);
    });
}

void multiplyTokens(const LinearArguments& a, const Variant& variant, std::size_t first,
                    std::size_t tokens, const ThreadPool& pool) {
    const Prompt prompt = promptOf(a, variant, first, tokens);
    parallelFor(pool, divideUp(tokens, kSELECT_TOKENS), [&](std::size_t task) {
        const std::size_t begin = task * kSELECT_TOKENS;
        selectOf(a, variant, prompt, begin, std::min(kSELECT_TOKENS, tokens - begin));
    });
    multiplyPanels(a, variant, prompt, pool);
}

}  // namespace

template <typename T>
const T* ConstantsCopy::append(const T* values, std::size_t count) {
    static_assert(sizeof(T) == sizeof(std::uint32_t), "they share memory");
    if (values == nullptr) return nullptr;
    std::uint32_t* to = mMemory.data() + mUsed;
    std::memcpy(to, values, count * sizeof(T));
    mUsed += divideUp(count * sizeof(T), kALIGNMENT) * kALIGNMENT / sizeof(T);
    return reinterpret_cast<const T*>(to);
}

void ConstantsCopy::place(LinearArguments& a) {
    mUsed = 0;
    mMemory.reserve(4 * divideUp(a.channels * sizeof(float), kALIGNMENT) * kALIGNMENT /
                    sizeof(float));
    a.constants.channelOrder = append(a.constants.channelOrder, a.channels);
    a.constants.shift = append(a.constants.shift, a.constants.shiftCount);
    a.constants.scoreScale = append(a.constants.scoreScale, a.channels);
    a.valueScale = append(a.valueScale, a.channels);
}

void ConstantsCopy::prefetch() const {
    // More than this would push out of the first-level cache what it brings into it.
    constexpr std::size_t kMOST = 16 << 10;
    const char* from = reinterpret_cast<const char*>(mMemory.data());
    const std::size_t bytes = std::min(mUsed * sizeof(std::uint32_t), kMOST);
    for (std::size_t at = 0; at < bytes; at += kALIGNMENT) __builtin_prefetch(from + at);
}

void nmLinear(const LinearArguments& a, const ThreadPool& pool) {
    if (a.outputs == 0) return;
    const Variant& variant = activeVariant();
    const std::size_t fitting = kPASS_BYTES / (a.channels * sizeof(float));
    const std::size_t passTokens = std::max(fitting, kMIN_PASS_TOKENS);
    for (std::size_t first = 0; first < a.tokens; first += passTokens) {
        const std::size_t tokens = std::min(passTokens, a.tokens - first);
        if (a.activationBits == 8) {
            multiplyIntegers(a, variant, first, tokens, pool);
        } else if (tokens <= kFEW_TOKENS) {
            multiplyFew(a, variant, first, tokens, pool);
        } else {
            multiplyTokens(a, variant, first, tokens, pool);
        }
    }
}

}  // namespace nmexport
