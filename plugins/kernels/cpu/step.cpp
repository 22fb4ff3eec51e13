#include "step.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "scratch.h"
#include "variant.h"

namespace nmexport {

namespace {

// Tokens of a prompt that meet a page of the cache together.
constexpr std::size_t kTILE_TOKENS = 8;
// Multiplications below which a second thread costs more than it brings.
constexpr std::size_t kMIN_TASK_PRODUCTS = std::size_t{1} << 15;
// Fewer units than this for each thread are cut into parts, lest one thread has much more to do.
constexpr std::size_t kUNITS_PER_THREAD = 3;
// Dimensions that a part of a unit has at least, a cache line of them.
constexpr std::size_t kDIMS = kALIGNMENT / sizeof(float);
// Elements below which one thread does what is done to each by itself.
constexpr std::size_t kMIN_TASK_ELEMENTS = std::size_t{1} << 14;

// body(begin, end) for runs that cover 0 .. count, as many as are worth a thread.
template <typename Body>
void inRuns(const ThreadPool& pool, std::size_t count, std::size_t elements, const Body& body) {
    const std::size_t worthwhile = std::min(count, elements / kMIN_TASK_ELEMENTS);
    const std::size_t runs = std::max(std::min(worthwhile, 4 * pool.threads), std::size_t{1});
    parallelFor(pool, runs,
                [&](std::size_t run) { body(count * run / runs, count * (run + 1) / runs); });
}

// Neighbouring tokens of one sequence.
struct Tile {
    std::size_t first;
    std::size_t count;
};

std::vector<Tile> tilesOf(const AttentionArguments& a) {
    std::vector<Tile> tiles;
    for (std::size_t t = 0; t < a.tokens; ++t) {
        const bool joins = !tiles.empty() && tiles.back().count < kTILE_TOKENS &&
                           a.sequences[t] == a.sequences[t - 1];
        if (joins) {
            ++tiles.back().count;
        } else {
            tiles.push_back({t, 1});
        }
    }
    return tiles;
}

// Turns dimensions i and i + rotary / 2 by the position's angle.
void turn(const AttentionArguments& a, std::size_t position, float* vector) {
    if (a.cosines == nullptr) return;
    const std::size_t half = a.rotary / 2;
    const float* cosine = a.cosines + position * half;
    const float* sine = a.sines + position * half;
    for (std::size_t i = 0; i < half; ++i) {
        const float x = vector[i];
        const float y = vector[i + half];
        vector[i] = x * cosine[i] - y * sine[i];
        vector[i + half] = y * cosine[i] + x * sine[i];
    }
}

// Puts a token's keys and values into its place of the cache.
void store(const AttentionArguments& a, std::size_t token) {
    thread_local Scratch<float> turned;
    float* key = turned.reserve(a.headDim);
    const std::size_t position = static_cast<std::size_t>(a.positions[token]);
    const std::size_t place = position % kPAGE;
    const std::size_t page = static_cast<std::size_t>(
        a.pages[static_cast<std::size_t>(a.sequences[token]) * a.pageStride + position / kPAGE]);
    for (std::size_t head = 0; head < a.kvHeads; ++head) {
        const std::size_t at = (page * a.kvHeads + head) * kPAGE * a.headDim;
        std::memcpy(key, a.newKeys + token * a.keyStride + head * a.headDim,
                    a.headDim * sizeof(float));
        turn(a, position, key);
        for (std::size_t d = 0; d < a.headDim; ++d) a.keys[at + d * kPAGE + place] = key[d];
        std::memcpy(a.values + at + place * a.headDim,
                    a.newValues + token * a.valueStride + head * a.headDim,
                    a.headDim * sizeof(float));
    }
}

// A tile's queries of one head of keys, turned and scaled: row = token * group + query head.
const float* queriesOf(const AttentionArguments& a, const Tile& tile, std::size_t kvHead) {
    thread_local Scratch<float> scratch;
    const std::size_t group = a.heads / a.kvHeads;
    float* rows = scratch.reserve(tile.count * group * a.headDim);
    for (std::size_t t = 0; t < tile.count; ++t) {
        const std::size_t token = tile.first + t;
        const float* from = a.queries + token * a.queryStride + kvHead * group * a.headDim;
        for (std::size_t g = 0; g < group; ++g) {
            float* row = rows + (t * group + g) * a.headDim;
            std::memcpy(row, from + g * a.headDim, a.headDim * sizeof(float));
            turn(a, static_cast<std::size_t>(a.positions[token]), row);
            for (std::size_t d = 0; d < a.headDim; ++d) row[d] *= a.scale;
        }
    }
    return rows;
}

// First position that a token at `position` sees.
std::size_t beginOf(const AttentionArguments& a, std::size_t position) {
    return a.window == 0 || position < a.window ? 0 : position + 1 - a.window;
}

// What a tile's tokens attend to of one head of keys.
struct Unit {
    Tile tile;
    std::size_t kvHead;
    std::size_t rows;           // of queries
    const std::int32_t* table;  // the pages that they see, from the first one on
    std::size_t pages;
    std::size_t start;   // the first page's first position
    std::size_t begin;   // the first position that any of them sees
    std::size_t last;    // the last one
    std::size_t stride;  // of a row of scores
};

Unit unitOf(const AttentionArguments& a, const Tile& tile, std::size_t kvHead) {
    Unit unit{tile, kvHead, tile.count * (a.heads / a.kvHeads), nullptr, 0, 0, 0, 0, 0};
    unit.last = static_cast<std::size_t>(a.positions[tile.first + tile.count - 1]);
    unit.begin = beginOf(a, static_cast<std::size_t>(a.positions[tile.first]));
    const std::size_t firstPage = unit.begin / kPAGE;
    unit.pages = unit.last / kPAGE + 1 - firstPage;
    unit.start = firstPage * kPAGE;
    unit.stride = unit.pages * kPAGE;
    unit.table =
        a.pages + static_cast<std::size_t>(a.sequences[tile.first]) * a.pageStride + firstPage;
    return unit;
}

// Where a page's keys and values begin.
std::size_t placeOf(const AttentionArguments& a, const Unit& unit, std::size_t page) {
    return (static_cast<std::size_t>(unit.table[page]) * a.kvHeads + unit.kvHead) * kPAGE *
           a.headDim;
}

void prefetch(const float* from, std::size_t count) {
    constexpr std::size_t kSTEP = kALIGNMENT / sizeof(float);
    for (std::size_t i = 0; i < count; i += kSTEP) __builtin_prefetch(from + i);
}

void prefetchKeys(const AttentionArguments& a, const Unit& unit, std::size_t page) {
    prefetch(a.keys + placeOf(a, unit, page), kPAGE * a.headDim);
}

// Scores of some of the pages.
void score(const AttentionArguments& a, const StepFunctions& step, const Unit& unit,
           std::size_t firstPage, std::size_t endPage, float* scores) {
    if (firstPage < endPage) prefetchKeys(a, unit, firstPage);
    const float* queries = queriesOf(a, unit.tile, unit.kvHead);
    for (std::size_t page = firstPage; page < endPage; ++page) {
        if (page + 1 < endPage) prefetchKeys(a, unit, page + 1);
        step.scorePage({queries, unit.rows, a.headDim, a.keys + placeOf(a, unit, page),
                        scores + page * kPAGE, unit.stride});
    }
}

// Some dimensions of the result, from the scores, which turn to weights. Each row's scores, weights
// and sums are those that it would have alone: a position that it does not see weighs nothing.
void addValues(const AttentionArguments& a, const StepFunctions& step, const Unit& unit,
               float* scores, std::size_t firstDim, std::size_t dims) {
    thread_local Scratch<float> sumScratch;
    thread_local Scratch<float> totalScratch;
    const std::size_t group = a.heads / a.kvHeads;
    float* sums = sumScratch.reserve(unit.rows * dims);
    float* totals = totalScratch.reserve(unit.rows);
    const auto valuesOf = [&](std::size_t page) {
        return a.values + placeOf(a, unit, page) + firstDim;
    };
    const auto prefetchValues = [&](std::size_t page) {
        for (std::size_t p = 0; p < kPAGE; ++p) prefetch(valuesOf(page) + p * a.headDim, dims);
    };
    prefetchValues(0);
    for (std::size_t row = 0; row < unit.rows; ++row) {
        const std::size_t position =
            static_cast<std::size_t>(a.positions[unit.tile.first + row / group]);
        float* of = scores + row * unit.stride;
        const std::size_t sees = beginOf(a, position) - unit.start;
        totals[row] = step.softmax(of, sees, position + 1 - unit.start);
        std::fill(of, of + sees, 0.0f);
        std::fill(of + (position + 1 - unit.start), of + unit.stride, 0.0f);
    }
    std::fill(sums, sums + unit.rows * dims, 0.0f);
    for (std::size_t page = 0; page < unit.pages; ++page) {
        if (page + 1 < unit.pages) prefetchValues(page + 1);
        const std::size_t first = page == 0 ? unit.begin - unit.start : 0;
        const std::size_t end = std::min(kPAGE, unit.last + 1 - unit.start - page * kPAGE);
        step.addPage({scores + page * kPAGE, unit.stride, unit.rows, a.headDim, first, end,
                      valuesOf(page), dims, sums});
    }
    for (std::size_t row = 0; row < unit.rows; ++row) {
        const std::size_t token = unit.tile.first + row / group;
        float* y = a.y + (token * a.heads + unit.kvHead * group + row % group) * a.headDim;
        const float factor = 1.0f / totals[row];
        for (std::size_t d = 0; d < dims; ++d) y[firstDim + d] = sums[row * dims + d] * factor;
    }
}

// One unit on one thread.
void attend(const AttentionArguments& a, const StepFunctions& step, const Unit& unit) {
    thread_local Scratch<float> scratch;
    float* scores = scratch.reserve(unit.rows * unit.stride);
    score(a, step, unit, 0, unit.pages, scores);
    addValues(a, step, unit, scores, 0, a.headDim);
}

// Few units on several threads: first runs of pages get scores, then runs of dimensions results.
// Each has a softmax of its own, which takes less than waiting for another's.
void attendInParts(const AttentionArguments& a, const StepFunctions& step,
                   const std::vector<Unit>& units, std::size_t parts, const ThreadPool& pool) {
    thread_local Scratch<float> scoreScratch;
    std::vector<std::size_t> places(1, 0);
    for (const Unit& unit : units) places.push_back(places.back() + unit.rows * unit.stride);
    float* scores = scoreScratch.reserve(places.back());
    parallelFor(pool, units.size() * parts, [&](std::size_t task) {
        const Unit& unit = units[task / parts];
        const std::size_t part = task % parts;
        score(a, step, unit, unit.pages * part / parts, unit.pages * (part + 1) / parts,
              scores + places[task / parts]);
    });
    const std::size_t vectors = (a.headDim + kDIMS - 1) / kDIMS;
    parallelFor(pool, units.size() * parts, [&](std::size_t task) {
        thread_local Scratch<float> ownScratch;
        const Unit& unit = units[task / parts];
        const std::size_t part = task % parts;
        const std::size_t first = std::min(vectors * part / parts * kDIMS, a.headDim);
        const std::size_t end = std::min(vectors * (part + 1) / parts * kDIMS, a.headDim);
        if (first == end) return;
        float* own = ownScratch.reserve(unit.rows * unit.stride);
        std::memcpy(own, scores + places[task / parts], unit.rows * unit.stride * sizeof(float));
        addValues(a, step, unit, own, first, end - first);
    });
}

// Products of the whole step, about.
std::size_t productsOf(const AttentionArguments& a) {
    std::size_t positions = 0;
    for (std::size_t t = 0; t < a.tokens; ++t) {
        const std::size_t position = static_cast<std::size_t>(a.positions[t]);
        positions += position + 1 - beginOf(a, position);
    }
    return 2 * positions * a.heads * a.headDim;
}

}  // namespace

void pagedAttention(const AttentionArguments& a, const ThreadPool& pool) {
    inRuns(pool, a.tokens, a.tokens * a.kvHeads * a.headDim * 4,
           [&](std::size_t begin, std::size_t end) {
               for (std::size_t token = begin; token < end; ++token) store(a, token);
           });
    const StepFunctions& step = *activeVariant().step;
    // The longest first: what a thread begins last should be short.
    const std::vector<Tile> tiles = tilesOf(a);
    std::vector<Unit> units;
    for (std::size_t i = tiles.size(); i-- > 0;) {
        for (std::size_t head = 0; head < a.kvHeads; ++head) {
            units.push_back(unitOf(a, tiles[i], head));
        }
    }
    if (productsOf(a) < 2 * kMIN_TASK_PRODUCTS || pool.threads == 1) {
        for (const Unit& unit : units) attend(a, step, unit);
    } else if (pool.startsFast && units.size() < kUNITS_PER_THREAD * pool.threads) {
        const std::size_t wanted = kUNITS_PER_THREAD * pool.threads;
        attendInParts(a, step, units, (wanted + units.size() - 1) / units.size(), pool);
    } else {
        parallelFor(pool, units.size(), [&](std::size_t i) { attend(a, step, units[i]); });
    }
}

void gatedSilu(const GatedSiluArguments& a, const ThreadPool& pool) {
    const StepFunctions& step = *activeVariant().step;
    inRuns(pool, a.tokens, a.tokens * a.channels, [&](std::size_t begin, std::size_t end) {
        for (std::size_t t = begin; t < end; ++t) {
            step.gatedSilu(a.gate + t * a.stride, a.up + t * a.stride, a.channels,
                           a.y + t * a.channels);
        }
    });
}

void residualNorm(const NormArguments& a, const ThreadPool& pool) {
    const StepFunctions& step = *activeVariant().step;
    inRuns(pool, a.tokens, a.tokens * a.channels, [&](std::size_t begin, std::size_t end) {
        for (std::size_t t = begin; t < end; ++t) {
            NormArguments token = a;
            token.x += t * a.channels;
            token.y += t * a.channels;
            if (a.skip != nullptr) {
                token.skip += t * a.channels;
                token.sum += t * a.channels;
            }
            step.norm(token);
        }
    });
}

}  // namespace nmexport
