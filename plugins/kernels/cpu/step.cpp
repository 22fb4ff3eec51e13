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

// Attention of a tile's tokens for one head of keys. Each row's scores, weights and sums are those
// that it would have alone: a position that it does not see weighs nothing.
void attend(const AttentionArguments& a, const StepFunctions& step, const Tile& tile,
            std::size_t kvHead) {
    thread_local Scratch<float> scoreScratch;
    thread_local Scratch<float> sumScratch;
    thread_local Scratch<float> totalScratch;
    const std::size_t group = a.heads / a.kvHeads;
    const std::size_t rows = tile.count * group;
    const std::size_t last = static_cast<std::size_t>(a.positions[tile.first + tile.count - 1]);
    const std::size_t begin = beginOf(a, static_cast<std::size_t>(a.positions[tile.first]));
    const std::size_t firstPage = begin / kPAGE;
    const std::size_t pages = last / kPAGE + 1 - firstPage;
    const std::size_t start = firstPage * kPAGE;
    const std::size_t stride = pages * kPAGE;
    const std::int32_t* table =
        a.pages + static_cast<std::size_t>(a.sequences[tile.first]) * a.pageStride + firstPage;
    const float* queries = queriesOf(a, tile, kvHead);
    float* scores = scoreScratch.reserve(rows * stride);
    float* sums = sumScratch.reserve(rows * a.headDim);
    float* totals = totalScratch.reserve(rows);
    const auto placeOf = [&](std::size_t page) {
        return (static_cast<std::size_t>(table[page]) * a.kvHeads + kvHead) * kPAGE * a.headDim;
    };
    for (std::size_t page = 0; page < pages; ++page) {
        step.scorePage(
            {queries, rows, a.headDim, a.keys + placeOf(page), scores + page * kPAGE, stride});
    }
    for (std::size_t row = 0; row < rows; ++row) {
        const std::size_t position =
            static_cast<std::size_t>(a.positions[tile.first + row / group]);
        float* of = scores + row * stride;
        const std::size_t sees = beginOf(a, position) - start;
        totals[row] = step.softmax(of, sees, position + 1 - start);
        std::fill(of, of + sees, 0.0f);
        std::fill(of + (position + 1 - start), of + stride, 0.0f);
    }
    std::fill(sums, sums + rows * a.headDim, 0.0f);
    for (std::size_t page = 0; page < pages; ++page) {
        const std::size_t first = page == 0 ? begin - start : 0;
        const std::size_t end = std::min(kPAGE, last + 1 - start - page * kPAGE);
        step.addPage({scores + page * kPAGE, stride, rows, a.headDim, first, end,
                      a.values + placeOf(page), sums});
    }
    for (std::size_t row = 0; row < rows; ++row) {
        const std::size_t token = tile.first + row / group;
        float* y = a.y + (token * a.heads + kvHead * group + row % group) * a.headDim;
        const float factor = 1.0f / totals[row];
        for (std::size_t d = 0; d < a.headDim; ++d) y[d] = sums[row * a.headDim + d] * factor;
    }
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
    const std::vector<Tile> tiles = tilesOf(a);
    const std::size_t units = tiles.size() * a.kvHeads;
    // The longest first: what a thread begins last should be short.
    const auto run = [&](std::size_t unit) {
        attend(a, step, tiles[tiles.size() - 1 - unit / a.kvHeads], unit % a.kvHeads);
    };
    if (productsOf(a) < 2 * kMIN_TASK_PRODUCTS || pool.threads == 1) {
        for (std::size_t unit = 0; unit < units; ++unit) run(unit);
    } else {
        parallelFor(pool, units, run);
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
