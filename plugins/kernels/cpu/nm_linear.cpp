#include "nm_linear.h"

#include <algorithm>
#include <cstring>

namespace nmexport {

namespace {

// Operands of one pass stay within the second- or third-level cache.
constexpr std::size_t kPASS_BYTES = std::size_t{8} << 20;
constexpr std::size_t kMIN_PASS_TOKENS = 64;
// Tokens selected together by one task; their groups share vectors.
constexpr std::size_t kSELECT_TOKENS = 8;
// Decode, with up to this many tokens (measured): sums of a tile take at most 16 KiB of the
// first-level cache ...
constexpr std::size_t kFEW_TOKENS = 6;
constexpr std::size_t kMAX_TILE_SUMS = 4096;
// ... a row's part in a tile is at least four cache lines ...
constexpr std::size_t kMIN_TILE_COLUMNS = 64;
// ... and waking another thread pays from about this many kept bytes on.
constexpr std::size_t kMIN_TASK_BYTES = std::size_t{96} << 10;
// Prefill: tokens of a task; their sums stay in the second-level cache.
constexpr std::size_t kMIN_PANEL_TOKENS = 32;
constexpr std::size_t kMAX_PANEL_TOKENS = 512;
// Tasks per thread at least, so that an interrupted thread does not hold up the others ...
constexpr std::size_t kTASKS_PER_THREAD = 2;
// ... and as many as leave no more than this share of the last round idle.
constexpr double kIDLE = 0.125;

std::size_t divideUp(std::size_t a, std::size_t b) {
    return (a + b - 1) / b;
}

// The tokens of one pass, selected.
struct Pass {
    std::size_t first;
    std::size_t tokens;
    SelectedTokens selected;
    float* nu;  // [tokens]
};

bool keepsAll(const LinearArguments& a) {
    return a.keepAll || a.pattern.n == a.pattern.m;
}

bool isInt8(const LinearArguments& a) {
    return a.weightScale != nullptr;
}

// Each row of W has scales of its own, which meet it before the sum; else they wait for the end.
bool hasScaledRows(const LinearArguments& a) {
    return isInt8(a) && a.scaleGroups > 1;
}

std::size_t weightType(const LinearArguments& a) {
    return isInt8(a) ? kINT8_WEIGHTS : static_cast<std::size_t>(a.type);
}

std::size_t weightBytes(const LinearArguments& a) {
    return isInt8(a) ? 1 : elementBytes(a.type);
}

WeightScales scalesFrom(const LinearArguments& a, std::size_t column) {
    if (!hasScaledRows(a)) return {};
    return {a.weightScale + column, a.channels / a.scaleGroups};
}

const char* weightsFrom(const LinearArguments& a, std::size_t column) {
    return static_cast<const char*>(a.w) + column * weightBytes(a);
}

const char* columnOf(const LinearArguments& a, const void* base, std::size_t column) {
    return static_cast<const char*>(base) + column * elementBytes(a.type);
}

void select(const LinearArguments& a, const Variant& variant, const Pass& pass) {
    const char* x = columnOf(a, a.x, pass.first * a.channels);
    const SelectedTokens& selected = pass.selected;
    const bool dense = keepsAll(a);
    if (dense) {
        keepTokens(variant, a.type, x, a.channels, pass.tokens, a.constants, selected);
    } else {
        selectTokens(variant, a.type, x, a.channels, pass.tokens, a.pattern, a.constants, selected);
    }
    for (std::size_t t = 0; t < pass.tokens; ++t) {
        // Where nothing is dropped, there is nothing to correct, not even for a constant token.
        const bool correct = a.varianceCorrection && !dense;
        pass.nu[t] = correct ? variant.varianceRatio(selected.z + t * selected.zStride,
                                                     selected.keep + t * selected.keepStride,
                                                     a.channels, a.varianceFloor)
                             : 1.0f;
        if (a.valueScale != nullptr) {
            variant.scaleValues(a.valueScale, a.channels, selected.z + t * selected.zStride);
        }
    }
}

// Of some columns from a token on, without its sums and factors.
Epilogue epilogueOf(const LinearArguments& a, std::size_t token, std::size_t firstColumn,
                    std::size_t columns) {
    const bool shifted = a.constants.dynamicShift && a.shiftWeight != nullptr;
    Epilogue epilogue{};
    epilogue.weightScale = isInt8(a) && !hasScaledRows(a) ? a.weightScale + firstColumn : nullptr;
    epilogue.columns = columns;
    epilogue.shiftWeight = shifted ? a.shiftWeight + firstColumn : nullptr;
    epilogue.bias = a.bias == nullptr ? nullptr : columnOf(a, a.bias, firstColumn);
    epilogue.y = static_cast<char*>(a.y) + (token * a.outputs + firstColumn) * elementBytes(a.type);
    return epilogue;
}

// The bias arrives while the rows are multiplied.
void prefetchBias(const LinearArguments& a, std::size_t begin, std::size_t end) {
    if (a.bias == nullptr) return;
    const char* last = columnOf(a, a.bias, end);
    for (const char* at = columnOf(a, a.bias, begin); at < last; at += kALIGNMENT) {
        __builtin_prefetch(at, 0, 2);  // the first-level cache has the sums to hold
    }
}

// Scratch of this thread for a pass, nothing selected yet.
Pass passOf(const LinearArguments& a, const Variant& variant, std::size_t first,
            std::size_t tokens) {
    thread_local Scratch<float> zScratch;
    thread_local Scratch<std::uint64_t> keepScratch;
    thread_local Scratch<float> etaScratch;
    thread_local Scratch<float> nuScratch;
    Pass pass;
    pass.first = first;
    pass.tokens = tokens;
    pass.selected.zStride = divideUp(a.channels, variant.lanes) * variant.lanes;
    pass.selected.z = zScratch.reserve(tokens * pass.selected.zStride);
    pass.selected.keepStride = keepWords(a.channels);
    pass.selected.keep = keepScratch.reserve(tokens * pass.selected.keepStride);
    pass.selected.eta = etaScratch.reserve(tokens);
    pass.nu = nuScratch.reserve(tokens);
    return pass;
}

// What each token of a pass keeps, as lists that are multiplied a slice at a time.
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
    const auto multiply =
        hasScaledRows(a) ? variant.scaledRowProduct : variant.rowProduct[weightType(a)];
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

// How the columns of a few tokens are cut: each task takes tiles of its own.
struct Cut {
    std::size_t tasks;
    std::size_t tiles;  // a multiple of the tasks
};

Cut cutOf(const LinearArguments& a, std::size_t tokens, const ThreadPool& pool) {
    const std::size_t groups = a.channels / static_cast<std::size_t>(a.pattern.m);
    const std::size_t kept =
        keepsAll(a) ? a.channels : groups * static_cast<std::size_t>(a.pattern.n);
    const std::size_t keptBytes = tokens * kept * a.outputs * weightBytes(a);
    const std::size_t worthwhile =
        std::min({pool.threads, keptBytes / kMIN_TASK_BYTES, a.outputs / kMIN_TILE_COLUMNS});
    const std::size_t tasks = std::max(worthwhile, std::size_t{1});
    const std::size_t fitting = divideUp(tokens * a.outputs, kMAX_TILE_SUMS);
    return {tasks, divideUp(fitting, tasks) * tasks};
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
    const Cut cut = cutOf(a, tokens, pool);
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

// Whether threads take equal shares of so many tasks, or nearly.
bool isEven(std::size_t tasks, std::size_t threads) {
    const std::size_t slots = divideUp(tasks, threads) * threads;
    const double idle = static_cast<double>(slots - tasks) / static_cast<double>(slots);
    return tasks >= kTASKS_PER_THREAD * threads && idle <= kIDLE;
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

// What the tokens of a prompt keep, for all threads to read.
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
        const auto multiply =
            hasScaledRows(a) ? variant.scaledPanelProduct : variant.panelProduct[weightType(a)];
        multiply(product);
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
        if (tokens <= kFEW_TOKENS) {
            multiplyFew(a, variant, first, tokens, pool);
        } else {
            multiplyTokens(a, variant, first, tokens, pool);
        }
    }
}

}  // namespace nmexport
