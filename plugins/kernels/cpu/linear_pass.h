// Shared by products in floating point and in integers: selection, epilogue, cutting of work.
#pragma once

#include "nm_linear.h"

namespace nmexport {

constexpr std::size_t divideUp(std::size_t a, std::size_t b) {
    return (a + b - 1) / b;
}

// Tokens selected together by one task; their groups share vectors.
constexpr std::size_t kSELECT_TOKENS = 8;
// A row's part in a tile is at least four cache lines of float32.
constexpr std::size_t kMIN_TILE_COLUMNS = 64;
// Sums of a tile take at most 16 KiB of the first-level cache.
constexpr std::size_t kMAX_TILE_SUMS = 4096;
// Waking another thread pays from about this many kept bytes on.
constexpr std::size_t kMIN_TASK_BYTES = std::size_t{96} << 10;
// The same where it waits at our side.
constexpr std::size_t kMIN_FAST_TASK_BYTES = std::size_t{16} << 10;

// The tokens of one pass, selected.
struct Pass {
    std::size_t first;
    std::size_t tokens;
    SelectedTokens selected;
    float* nu;  // [tokens]
};

// Scratch of this thread for a pass, nothing selected yet.
Pass passOf(const LinearArguments& a, const Variant& variant, std::size_t first,
            std::size_t tokens);
void select(const LinearArguments& a, const Variant& variant, const Pass& pass);
// Some channels of it, from a multiple of 64 on: whole groups, without a dynamic shift, nu and
// `valueScale`.
void selectPart(const LinearArguments& a, const Variant& variant, const Pass& pass,
                std::size_t begin, std::size_t end);
// nu of a token that is selected for, its values not scaled yet.
float varianceRatioOf(const LinearArguments& a, const Variant& variant, const Pass& pass,
                      std::size_t t);

bool keepsAll(const LinearArguments& a);
// Rows of W that a token keeps.
std::size_t keptRows(const LinearArguments& a);
// Bytes of a row's first `columns` columns.
std::size_t rowBytes(const LinearArguments& a, std::size_t columns);
// Each row of W has scales of its own, which meet it before the sum; else they wait for the end. A
// zero point in floating point is taken from the weight, so that its scale cannot wait either.
bool hasScaledRows(const LinearArguments& a);
const char* columnOf(const LinearArguments& a, const void* base, std::size_t column);
// Of some columns from a token on, without its sums and factors.
Epilogue epilogueOf(const LinearArguments& a, std::size_t token, std::size_t firstColumn,
                    std::size_t columns);
// The bias arrives while the rows are multiplied.
void prefetchBias(const LinearArguments& a, std::size_t begin, std::size_t end);

// How the columns of a few tokens are cut: each task takes tiles of its own.
struct Cut {
    std::size_t tasks;
    std::size_t tiles;  // a multiple of the tasks
};
// Where `bytes` of W are read.
Cut cutOf(const LinearArguments& a, std::size_t tokens, std::size_t bytes, const ThreadPool& pool);

// True if threads take equal shares of so many tasks, or nearly.
bool isEven(std::size_t tasks, std::size_t threads);

// With values in 8 bits: products in integers.
void multiplyIntegers(const LinearArguments& a, const Variant& variant, std::size_t first,
                      std::size_t tokens, const ThreadPool& pool);

}  // namespace nmexport
