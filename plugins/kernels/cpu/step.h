// The parts of a step between its linears: norms, gated activations, attention over a paged cache.
//
// A token's result depends on its own sequence alone, and every sum has one order, whatever other
// tokens are in the step, however a prompt is cut, on however many threads.
#pragma once

#include <cstddef>
#include <cstdint>

#include "thread_pool.h"

namespace nmexport {

// Positions of a page of the cache.
constexpr std::size_t kPAGE = 32;

// Grouped-query attention of T tokens of several sequences, each on its own pages of the cache,
// which the tokens' keys and values are written into first.
//
//   sequence s, position p  ──►  page pages[s, p / kPAGE], place p % kPAGE
//   keys    [page, kv head, D, kPAGE]      a vector holds one dimension of neighbouring positions
//   values  [page, kv head, kPAGE, D]      a vector holds neighbouring dimensions of one position
struct AttentionArguments {
    std::size_t tokens;
    std::size_t heads;     // of queries, a multiple of kvHeads
    std::size_t kvHeads;   // of keys and values
    std::size_t headDim;   // D
    const float* queries;  // [tokens, heads * D], rows queryStride apart
    const float* newKeys;  // [tokens, kvHeads * D], rows keyStride apart
    const float* newValues;
    std::size_t queryStride;
    std::size_t keyStride;
    std::size_t valueStride;
    const std::int32_t* sequences;  // [tokens]: row of `pages`; neighbours of one share work
    const std::int32_t* positions;  // [tokens]: ascending within a sequence
    const std::int32_t* pages;      // [sequences, pageStride]
    std::size_t pageStride;
    const float* cosines;  // [positions, rotary / 2], or null: nothing is turned
    const float* sines;
    std::size_t rotary;  // the first dimensions, which are turned
    float* keys;
    float* values;
    float* y;  // [tokens, heads * D]
    float scale;
    std::size_t window;  // positions that a token sees, itself included; 0 sees all before it
};

void pagedAttention(const AttentionArguments& arguments, const ThreadPool& pool);

// y = silu(gate) * up, both rows of `stride` elements.
struct GatedSiluArguments {
    std::size_t tokens;
    std::size_t channels;
    std::size_t stride;
    const float* gate;
    const float* up;
    float* y;  // [tokens, channels]
};

void gatedSilu(const GatedSiluArguments& arguments, const ThreadPool& pool);

// sum = x + skip;  y = sum / sqrt(mean(sum^2) + epsilon) * weight.
struct NormArguments {
    std::size_t tokens;
    std::size_t channels;
    const float* x;     // [tokens, channels]
    const float* skip;  // the same, or null: then there is no sum
    const float* weight;
    float* y;
    float* sum;
    float epsilon;
};

void residualNorm(const NormArguments& arguments, const ThreadPool& pool);

// -- what every instruction-set variant has for them ---------------------------------------------

// Rows of queries against a page of keys.
struct PageScores {
    const float* queries;  // [rows, D]
    std::size_t rows;
    std::size_t headDim;
    const float* keys;  // [D, kPAGE]
    float* scores;      // [rows, stride] of the page's first position
    std::size_t stride;
};

// Weights of positions [first, last) of a page times some dimensions of their values, added to
// sums.
struct PageSums {
    const float* weights;  // [rows, stride] of the page's first position
    std::size_t stride;
    std::size_t rows;
    std::size_t headDim;
    std::size_t first;
    std::size_t last;
    const float* values;  // [kPAGE, D] from the first of the dimensions on
    std::size_t dims;     // how many of them
    float* sums;          // [rows, dims]
};

struct StepFunctions {
    void (*scorePage)(const PageScores& page);
    void (*addPage)(const PageSums& page);
    // Turns scores [begin, end) into exp(score - largest) and returns their sum. Scores of the
    // vectors of 16 that the ends lie in may be overwritten; `scores` is of a page's first
    // position.
    float (*softmax)(float* scores, std::size_t begin, std::size_t end);
    void (*gatedSilu)(const float* gate, const float* up, std::size_t count, float* y);
    // One token; `skip` and `sum` may be null.
    void (*norm)(const NormArguments& token);
};

}  // namespace nmexport
