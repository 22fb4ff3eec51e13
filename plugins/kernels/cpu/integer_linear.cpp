// NMLinear with values in 8 bits: products in integers, see dots.h.
#include <algorithm>
#include <cstring>
#include <numeric>

#include "dots.h"
#include "group_scales.h"
#include "linear_pass.h"

namespace nmexport {

namespace {

// Sums of a tile: of many tokens they stay in the first-level cache, beside a packed step of W. Of
// up to kWIDE_TOKENS they may fill more of the second: longer parts of rows come faster (measured).
constexpr std::size_t kTILE_SUM_BYTES = std::size_t{24} << 10;
constexpr std::size_t kWIDE_SUM_BYTES = std::size_t{96} << 10;
constexpr std::size_t kWIDE_TOKENS = 24;
constexpr std::size_t kCHUNK = 16;  // positions that a quantised block is a multiple of

IntegerFormat formatOf(const LinearArguments& a) {
    return integerFormatOf(a.weightType);
}

// Records lie as the kernels read them that they were made for.
const DotKernels& dotsOf(const LinearArguments& a) {
    return a.groupScales == nullptr ? activeDots() : a.groupScales->kernels();
}

// The last index of a table of products.
std::size_t scaleTypeOf(const LinearArguments& a) {
    return a.groupScales != nullptr && a.groupScales->areHalves() ? 1 : 0;
}

std::size_t blocksOf(const LinearArguments& a) {
    return a.channels / a.activationBlock;
}

// The columns of whole steps.
std::size_t columnsOfSteps(const LinearArguments& a, const DotKernels& dots, std::size_t steps) {
    return steps * columnsOfStep(formatOf(a), dots.stepBytes);
}

std::size_t stepsOf(const LinearArguments& a, const DotKernels& dots) {
    return divideUp(rowBytes(a, a.outputs), dots.stepBytes);
}

IntegerWeights weightsFrom(const LinearArguments& a, std::size_t column, std::size_t columns) {
    IntegerWeights weights{};
    weights.w = static_cast<const std::uint8_t*>(a.w) + rowBytes(a, column);
    weights.rowBytes = rowBytes(a, a.outputs);
    weights.columns = columns;
    weights.groupBlocks = blocksOf(a) / a.scaleGroups;
    weights.zeroPoints = a.zeroPoints;
    if (a.groupScales != nullptr) a.groupScales->place(column, weights);
    if (weights.zeroPoints == ZeroPoints::kINTEGERS) {
        weights.zero = static_cast<const std::uint8_t*>(a.weightZero) + rowBytes(a, column);
    }
    return weights;
}

// How many positions of a block are kept.
std::size_t keptOf(const std::uint64_t* keep, std::size_t first, std::size_t count) {
    std::size_t kept = 0;
    for (std::size_t p = first; p < first + count; p += kCHUNK) {
        kept += static_cast<std::size_t>(__builtin_popcountll(keep[p / 64] >> (p % 64) & 0xffff));
    }
    return kept;
}

// A run of channels of one token.
struct Channels {
    std::size_t begin;
    std::size_t end;
};

// Lists that some tokens' kept rows are written to, in scratch of the thread that makes them. Any
// thread may fill a part of them.
class RowLists {
  public:
    RowLists(const LinearArguments& a, const Variant& variant, std::size_t tokens)
        : mArguments(a),
          mVariant(variant),
          mBlocks(blocksOf(a)),
          mQuads(a.channels / kQUAD + mBlocks) {
        thread_local Lists scratch;
        mOffsets = scratch.offsets.reserve(tokens * mQuads * kQUAD);
        mWords = scratch.words.reserve(tokens * mQuads);
        mEnds = scratch.ends.reserve(tokens * mBlocks);
        mScales = scratch.scales.reserve(tokens * mBlocks);
        mTotals = scratch.totals.reserve(tokens * mBlocks);
    }

    // Those of token `t` of the pass.
    QuantisedRows of(std::size_t t) const {
        return {mOffsets + t * mQuads * kQUAD, mWords + t * mQuads, mEnds + t * mBlocks,
                mScales + t * mBlocks, mTotals + t * mBlocks};
    }

    // Quantises what token `t` of the pass keeps of some channels, which are whole blocks. Before
    // them lie `quads`. `scale` multiplies the values of all channels; null where `select` did.
    void list(const DotKernels& dots, const Pass& pass, std::size_t t, Channels channels,
              std::size_t quads, const float* scale) const {
        thread_local Working scratch;
        const std::size_t size = mArguments.activationBlock;
        const std::size_t total = channels.end - channels.begin;
        std::int32_t* rows = scratch.rows.reserve(total + mVariant.lanes);
        float* kept = scratch.kept.reserve(total + mVariant.lanes);
        float* block = scratch.block.reserve(size);
        std::int8_t* bytes = scratch.bytes.reserve(size);
        const std::uint64_t* keep = pass.selected.keep + t * pass.selected.keepStride;
        const float* z = pass.selected.z + t * pass.selected.zStride + channels.begin;
        if (scale != nullptr) {
            // A copy: the variance is that of unscaled values, and is taken once all are there. It
            // needs no room behind it: whole blocks are whole vectors.
            float* scaled = scratch.scaled.reserve(total);
            std::memcpy(scaled, z, total * sizeof *z);
            mVariant.scaleValues(scale + channels.begin, total, scaled);
            z = scaled;
        }
        mVariant.listKept({z, keep + channels.begin / 64, total, rows, kept});
        std::size_t first = 0, quad = quads;
        for (std::size_t b = channels.begin / size; b < channels.end / size; ++b) {
            const std::size_t count = keptOf(keep, b * size, size);
            const std::size_t at = t * mBlocks + b;
            const float* values = padded(kept + first, count, block);
            mScales[at] =
                dots.quantise({values, nullptr, 0, roundUp(count, kCHUNK)}, bytes, mTotals + at);
            append(rows + first, channels.begin, count, bytes, t * mQuads + quad);
            first += count;
            quad += divideUp(count, kQUAD);
            mEnds[at] = quad;
        }
    }

  private:
    static std::size_t roundUp(std::size_t count, std::size_t unit) {
        return divideUp(count, unit) * unit;
    }

    // The values, with zeros behind them up to a whole chunk.
    static const float* padded(const float* values, std::size_t count, float* block) {
        if (count % kCHUNK == 0) return values;
        std::memcpy(block, values, count * sizeof *values);
        std::fill(block + count, block + roundUp(count, kCHUNK), 0.0f);
        return block;
    }

    // Fills quads from `quad` on with a block's rows, which count from row `base` on; the bytes are
    // zeros past their end already.
    void append(const std::int32_t* row, std::size_t base, std::size_t count,
                const std::int8_t* bytes, std::size_t quad) const {
        const std::size_t stride = rowBytes(mArguments, mArguments.outputs);
        std::size_t* to = mOffsets + quad * kQUAD;
        for (std::size_t i = 0; i < count; ++i) {
            to[i] = (base + static_cast<std::size_t>(row[i])) * stride;
        }
        for (std::size_t i = count; i % kQUAD != 0; ++i) to[i] = to[count - 1];
        std::memcpy(mWords + quad, bytes, divideUp(count, kQUAD) * sizeof *mWords);
    }

    struct Lists {
        Scratch<std::int32_t> words, totals;
        Scratch<float> scales;
        Scratch<std::size_t> offsets, ends;
    };
    struct Working {
        Scratch<std::int32_t> rows;  // as listKept gives them
        Scratch<float> scaled, kept, block;
        Scratch<std::int8_t> bytes;
    };

    const LinearArguments& mArguments;
    const Variant& mVariant;
    const std::size_t mBlocks;
    const std::size_t mQuads;  // of a token at most
    std::size_t* mOffsets;
    std::int32_t* mWords;
    std::size_t* mEnds;
    float* mScales;
    std::int32_t* mTotals;
};

float* sumsOf(std::size_t count) {
    thread_local Scratch<float> scratch;
    return scratch.reserve(count);
}

void finishToken(const LinearArguments& a, const Variant& variant, const DotKernels& dots,
                 float* sums, std::size_t sumCount, TokenFactors factors, Epilogue epilogue) {
    dots.restoreOrder[static_cast<int>(formatOf(a))](sums, sumCount);
    epilogue.sums = sums;
    epilogue.factors = factors;
    variant.epilogue[static_cast<int>(a.type)](epilogue);
}

// A task's tiles of columns, for tokens whose kept rows are listed.
void multiplyTask(const LinearArguments& a, const Variant& variant, const DotKernels& dots,
                  const Cut& cut, std::size_t task, const Pass& pass, const float* nu,
                  const RowLists& lists) {
    const std::size_t steps = stepsOf(a, dots);
    RowDots product{};
    for (std::size_t t = 0; t < pass.tokens; ++t) product.tokens[t] = lists.of(t);
    product.tokenCount = pass.tokens;
    product.blocks = blocksOf(a);
    product.ahead = cacheAhead();
    const std::size_t last = cut.tiles * (task + 1) / cut.tasks;
    for (std::size_t tile = cut.tiles * task / cut.tasks; tile < last; ++tile) {
        const std::size_t firstStep = steps * tile / cut.tiles;
        const std::size_t count = steps * (tile + 1) / cut.tiles - firstStep;
        if (count == 0) continue;
        const std::size_t begin = columnsOfSteps(a, dots, firstStep);
        const std::size_t end = std::min(begin + columnsOfSteps(a, dots, count), a.outputs);
        product.weights = weightsFrom(a, begin, end - begin);
        product.sumStride = columnsOfSteps(a, dots, count);
        product.sums = sumsOf(pass.tokens * product.sumStride);
        prefetchBias(a, begin, end);
        dots.rowDots[static_cast<int>(formatOf(a))][scaleTypeOf(a)](product);
        for (std::size_t t = 0; t < pass.tokens; ++t) {
            finishToken(a, variant, dots, product.sums + t * product.sumStride, product.sumStride,
                        {nu[t], pass.selected.eta[t]},
                        epilogueOf(a, pass.first + t, begin, end - begin));
        }
    }
}

// Channels that a part of the selection is a multiple of: whole groups, blocks and words of keep
// mask. 0 where a token cannot be selected for in parts: its mean goes before, or a block does not
// keep a number of rows that is known beforehand.
std::size_t partUnitOf(const LinearArguments& a) {
    const std::size_t m = static_cast<std::size_t>(a.pattern.m);
    const bool isKnown = keepsAll(a) || a.activationBlock % m == 0;
    if (!isKnown || a.constants.dynamicShift) return 0;
    return std::lcm(std::lcm(std::size_t{64}, keepsAll(a) ? std::size_t{1} : m), a.activationBlock);
}

// The parts of few tokens' channels are selected for on all threads, then the columns multiplied.
void multiplyInParts(const LinearArguments& a, const Variant& variant, const DotKernels& dots,
                     const Cut& cut, std::size_t unit, std::size_t first, std::size_t tokens,
                     const ThreadPool& pool) {
    const Pass pass = passOf(a, variant, first, tokens);
    const RowLists lists(a, variant, tokens);
    const std::size_t units = divideUp(a.channels, unit);
    const std::size_t parts = std::min(units, cut.tasks);
    const std::size_t blockRows = keepsAll(a)
                                      ? a.activationBlock
                                      : a.activationBlock / static_cast<std::size_t>(a.pattern.m) *
                                            static_cast<std::size_t>(a.pattern.n);
    parallelFor(pool, parts, [&](std::size_t part) {
        const Channels channels{units * part / parts * unit,
                                std::min(units * (part + 1) / parts * unit, a.channels)};
        const std::size_t quads = channels.begin / a.activationBlock * divideUp(blockRows, kQUAD);
        selectPart(a, variant, pass, channels.begin, channels.end);
        for (std::size_t t = 0; t < tokens; ++t) {
            lists.list(dots, pass, t, channels, quads, a.valueScale);
        }
    });
    parallelFor(pool, cut.tasks, [&](std::size_t task) {
        float nu[kMOST_ROW_TOKENS];
        for (std::size_t t = 0; t < tokens; ++t) nu[t] = varianceRatioOf(a, variant, pass, t);
        multiplyTask(a, variant, dots, cut, task, pass, nu, lists);
    });
}

// One to three tokens: each reads the rows that it keeps. A task owns tiles of columns. It selects
// for itself, as in floating point, where a loop takes long to start.
void multiplyRows(const LinearArguments& a, const Variant& variant, std::size_t first,
                  std::size_t tokens, const ThreadPool& pool) {
    const DotKernels& dots = dotsOf(a);
    const Cut cut = cutOf(a, tokens, tokens * keptRows(a) * rowBytes(a, a.outputs), pool);
    const std::size_t unit = pool.startsFast && cut.tasks > 1 ? partUnitOf(a) : 0;
    if (unit != 0 && a.channels > unit) {
        return multiplyInParts(a, variant, dots, cut, unit, first, tokens, pool);
    }
    parallelFor(pool, cut.tasks, [&](std::size_t task) {
        const Pass pass = passOf(a, variant, first, tokens);
        select(a, variant, pass);
        const RowLists lists(a, variant, tokens);
        for (std::size_t t = 0; t < tokens; ++t) {
            lists.list(dots, pass, t, {0, a.channels}, 0, nullptr);
        }
        multiplyTask(a, variant, dots, cut, task, pass, pass.nu, lists);
    });
}

// The kept values of many tokens, quantised, for all threads to read.
struct Operand {
    std::size_t first;
    std::size_t tokens;
    std::int8_t* values;    // [tokens, channels], zeros where nothing is kept
    float* scales;          // [blocks, tokens]
    std::int32_t* totals;   // [blocks, tokens]
    TokenFactors* factors;  // [tokens]
};

Operand operandOf(const LinearArguments& a, std::size_t first, std::size_t tokens) {
    thread_local Scratch<std::int8_t> valueScratch;
    thread_local Scratch<float> scaleScratch;
    thread_local Scratch<std::int32_t> totalScratch;
    thread_local Scratch<TokenFactors> factorScratch;
    return {first,
            tokens,
            valueScratch.reserve(tokens * a.channels),
            scaleScratch.reserve(tokens * blocksOf(a)),
            totalScratch.reserve(tokens * blocksOf(a)),
            factorScratch.reserve(tokens)};
}

// Selects for some tokens and quantises what they keep.
void quantiseTokens(const LinearArguments& a, const Variant& variant, const DotKernels& dots,
                    const Operand& operand, std::size_t begin, std::size_t count) {
    const Pass pass = passOf(a, variant, operand.first + begin, count);
    select(a, variant, pass);
    const std::size_t size = a.activationBlock;
    for (std::size_t t = 0; t < count; ++t) {
        const float* z = pass.selected.z + t * pass.selected.zStride;
        const std::uint64_t* keep =
            keepsAll(a) ? nullptr : pass.selected.keep + t * pass.selected.keepStride;
        const std::size_t token = begin + t;
        for (std::size_t b = 0; b < blocksOf(a); ++b) {
            const std::size_t at = b * operand.tokens + token;
            std::int8_t* to = operand.values + token * a.channels + b * size;
            operand.scales[at] = dots.quantise({z, keep, b * size, size}, to, operand.totals + at);
        }
        operand.factors[token] = {pass.nu[t], pass.selected.eta[t]};
    }
}

// How many tokens are cut: a task owns some steps of columns and a run of tokens.
struct TileCut {
    std::size_t tiles;
    std::size_t runs;
};

TileCut tilesOf(const LinearArguments& a, const DotKernels& dots, std::size_t tokens,
                const ThreadPool& pool) {
    const std::size_t steps = stepsOf(a, dots);
    const std::size_t stepBytes = columnsOfSteps(a, dots, 1) * sizeof(float);
    const std::size_t sumBytes = tokens <= kWIDE_TOKENS ? kWIDE_SUM_BYTES : kTILE_SUM_BYTES;
    const std::size_t runs = divideUp(tokens * stepBytes, sumBytes);
    const std::size_t runBytes = divideUp(tokens, runs) * stepBytes;
    const std::size_t fitting = std::max(sumBytes / runBytes, std::size_t{1});
    std::size_t tiles = divideUp(steps, fitting);
    const std::size_t bytes = a.channels * rowBytes(a, a.outputs);
    if (bytes >= 2 * kMIN_TASK_BYTES / std::min(tokens, std::size_t{8})) {
        while (tiles < steps && pool.threads > 1 && tiles * runs % pool.threads != 0 &&
               !isEven(tiles * runs, pool.threads)) {
            ++tiles;
        }
    }
    return {tiles, runs};
}

// Many tokens: every row is read once for a run of them.
void multiplyTiles(const LinearArguments& a, const Variant& variant, std::size_t first,
                   std::size_t tokens, const ThreadPool& pool) {
    const DotKernels& dots = dotsOf(a);
    const Operand operand = operandOf(a, first, tokens);
    const std::size_t together = std::min(divideUp(tokens, pool.threads), kSELECT_TOKENS);
    parallelFor(pool, divideUp(tokens, together), [&](std::size_t task) {
        const std::size_t begin = task * together;
        quantiseTokens(a, variant, dots, operand, begin, std::min(together, tokens - begin));
    });
    const std::size_t steps = stepsOf(a, dots);
    const TileCut cut = tilesOf(a, dots, tokens, pool);
    parallelFor(pool, cut.tiles * cut.runs, [&](std::size_t task) {
        thread_local Scratch<std::uint8_t> packedScratch;
        const std::size_t tile = task / cut.runs;
        const std::size_t run = task % cut.runs;
        const std::size_t firstStep = steps * tile / cut.tiles;
        const std::size_t count = steps * (tile + 1) / cut.tiles - firstStep;
        const std::size_t begin = columnsOfSteps(a, dots, firstStep);
        const std::size_t end = std::min(begin + columnsOfSteps(a, dots, count), a.outputs);
        const std::size_t token = tokens * run / cut.runs;
        TileDots product{};
        product.weights = weightsFrom(a, begin, end - begin);
        product.channels = a.channels;
        product.block = a.activationBlock;
        product.values = operand.values + token * a.channels;
        product.scales = operand.scales + token;
        product.totals = operand.totals + token;
        product.blockTokens = tokens;
        product.tokens = tokens * (run + 1) / cut.runs - token;
        product.packed = packedScratch.reserve(dots.packedBytes(a.activationBlock));
        product.sumStride = columnsOfSteps(a, dots, count);
        product.sums = sumsOf(product.tokens * product.sumStride);
        dots.tileDots[static_cast<int>(formatOf(a))][scaleTypeOf(a)](product);
        for (std::size_t t = 0; t < product.tokens; ++t) {
            finishToken(a, variant, dots, product.sums + t * product.sumStride, product.sumStride,
                        operand.factors[token + t],
                        epilogueOf(a, first + token + t, begin, end - begin));
        }
    });
}

}  // namespace

void multiplyIntegers(const LinearArguments& a, const Variant& variant, std::size_t first,
                      std::size_t tokens, const ThreadPool& pool) {
    // If all rows are kept, several tokens share them.
    if (tokens == 1 || (tokens <= kMOST_ROW_TOKENS && !keepsAll(a))) {
        multiplyRows(a, variant, first, tokens, pool);
    } else {
        multiplyTiles(a, variant, first, tokens, pool);
    }
}

}  // namespace nmexport
