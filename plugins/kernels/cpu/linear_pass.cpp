#include "linear_pass.h"

#include <algorithm>

namespace nmexport {

namespace {

// Tasks per thread at least, so that an interrupted thread does not hold up the others ...
constexpr std::size_t kTASKS_PER_THREAD = 2;
// ... and as many as leave no more than this share of the last round idle.
constexpr double kIDLE = 0.125;

}  // namespace

bool keepsAll(const LinearArguments& a) {
    return a.keepAll || a.pattern.n == a.pattern.m;
}

std::size_t keptRows(const LinearArguments& a) {
    if (keepsAll(a)) return a.channels;
    return a.channels / static_cast<std::size_t>(a.pattern.m) *
           static_cast<std::size_t>(a.pattern.n);
}

std::size_t rowBytes(const LinearArguments& a, std::size_t columns) {
    switch (a.weightType) {
        case WeightType::kELEMENT:
            return columns * elementBytes(a.type);
        case WeightType::kINT8:
            return columns;
        default:
            return columns / 2;
    }
}

bool hasScaledRows(const LinearArguments& a) {
    if (a.weightType == WeightType::kELEMENT) return false;
    if (a.scaleGroups > 1 || a.zeroPoints == ZeroPoints::kFLOATS) return true;
    return a.zeroPoints != ZeroPoints::kNONE && a.activationBits == 0;
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
        pass.nu[t] = varianceRatioOf(a, variant, pass, t);
        if (a.valueScale != nullptr) {
            variant.scaleValues(a.valueScale, a.channels, selected.z + t * selected.zStride);
        }
    }
}

void selectPart(const LinearArguments& a, const Variant& variant, const Pass& pass,
                std::size_t begin, std::size_t end) {
    SelectionConstants constants = a.constants;
    if (constants.channelOrder != nullptr) constants.channelOrder += begin;
    if (constants.scoreScale != nullptr) constants.scoreScale += begin;
    if (constants.shiftCount > 1) constants.shift += begin;
    for (std::size_t t = 0; t < pass.tokens; ++t) {
        // In an order of their own, any of the token's channels may be the part's.
        const std::size_t from = constants.channelOrder == nullptr ? begin : 0;
        const char* x = columnOf(a, a.x, (pass.first + t) * a.channels + from);
        const SelectedTokens& all = pass.selected;
        float eta = 0.0f;
        const SelectedTokens part{all.z + t * all.zStride + begin, all.zStride,
                                  all.keep + t * all.keepStride + begin / 64, all.keepStride, &eta};
        if (keepsAll(a)) {
            keepTokens(variant, a.type, x, end - begin, 1, constants, part);
        } else {
            selectTokens(variant, a.type, x, end - begin, 1, a.pattern, constants, part);
        }
        if (begin == 0) all.eta[t] = eta;
    }
}

float varianceRatioOf(const LinearArguments& a, const Variant& variant, const Pass& pass,
                      std::size_t t) {
    // If nothing is dropped, there is nothing to correct, not even for a constant token.
    if (!a.varianceCorrection || keepsAll(a)) return 1.0f;
    const SelectedTokens& selected = pass.selected;
    return variant.varianceRatio(selected.z + t * selected.zStride,
                                 selected.keep + t * selected.keepStride, a.channels,
                                 a.varianceFloor);
}

Epilogue epilogueOf(const LinearArguments& a, std::size_t token, std::size_t firstColumn,
                    std::size_t columns) {
    const bool shifted = a.constants.dynamicShift && a.shiftWeight != nullptr;
    Epilogue epilogue{};
    if (a.weightType != WeightType::kELEMENT && !hasScaledRows(a)) {
        epilogue.weightScale = a.weightScale + firstColumn;
    }
    epilogue.columns = columns;
    epilogue.shiftWeight = shifted ? a.shiftWeight + firstColumn : nullptr;
    epilogue.bias = a.bias == nullptr ? nullptr : columnOf(a, a.bias, firstColumn);
    epilogue.y = static_cast<char*>(a.y) + (token * a.outputs + firstColumn) * elementBytes(a.type);
    return epilogue;
}

void prefetchBias(const LinearArguments& a, std::size_t begin, std::size_t end) {
    if (a.bias == nullptr) return;
    const char* last = columnOf(a, a.bias, end);
    for (const char* at = columnOf(a, a.bias, begin); at < last; at += kALIGNMENT) {
        __builtin_prefetch(at, 0, 2);  // the first-level cache has the sums to hold
    }
}

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

Cut cutOf(const LinearArguments& a, std::size_t tokens, std::size_t bytes, const ThreadPool& pool) {
    const std::size_t least = pool.startsFast ? kMIN_FAST_TASK_BYTES : kMIN_TASK_BYTES;
    const std::size_t worthwhile =
        std::min({pool.threads, bytes / least, a.outputs / kMIN_TILE_COLUMNS});
    const std::size_t tasks = std::max(worthwhile, std::size_t{1});
    const std::size_t fitting = divideUp(tokens * a.outputs, kMAX_TILE_SUMS);
    return {tasks, divideUp(fitting, tasks) * tasks};
}

bool isEven(std::size_t tasks, std::size_t threads) {
    const std::size_t slots = divideUp(tasks, threads) * threads;
    const double idle = static_cast<double>(slots - tasks) / static_cast<double>(slots);
    return tasks >= kTASKS_PER_THREAD * threads && idle <= kIDLE;
}

}  // namespace nmexport
