// The instruction-set variants: one table of functions each, chosen once at run time.
//
// Every variant computes the same bits: selection is exact integer work, every output element is
// one chain of fused multiply-adds in ascending position order, and nothing else is contracted.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "element.h"
#include "step.h"

namespace nmexport {

// Positions whose kept rows are multiplied before moving on: one machine word of keep mask.
constexpr std::size_t kBLOCK = 64;
// Vectors of accumulators a prefill panel is wide; they stay in registers across a block.
constexpr std::size_t kPANEL_VECTORS = 8;

// The steps from one token's row of X to the operand that is selected from. A position is a
// channel's place in the order, where there is one: X is gathered first, all the rest lies by
// position.
//
//   x        | 0 | 1 | 2 | 3 | ...     by channel
//   order    | 2 | 0 | 3 | 1 | ...
//   z        | x2| x0| x3| x1| ...     by position, as rows of W, shifts, scales and keep masks
struct TokenInput {
    const void* x;                     // [channels] T
    std::size_t channels;              // K
    const std::int32_t* channelOrder;  // [channels] or null: position -> channel
    const float* shift;                // [shiftCount] or null, by position
    std::size_t shiftCount;            // 1 or channels
    bool dynamicShift;                 // eta is the token's own mean; excludes shift
};

// The positions that one token keeps, ascending: as bits, and as a list.
struct KeptRows {
    const float* z;             // [channels]
    const std::uint64_t* keep;  // bit p = position p is kept
    std::size_t channels;
    std::int32_t* rows;  // written: positions; there is room for a vector more than are kept
    float* values;       // the same
};

// The values that one token keeps, in blocks of kBLOCK positions: those of a block, ascending, and
// a bit for each of its positions.
struct KeptBlocks {
    const float* z;             // [channels], by position
    const std::uint64_t* keep;  // bit p = position p is kept
    std::size_t channels;
    float* values;         // [blocks, blockTokens, stride] from this token on, written
    std::size_t stride;    // room for a block's values: whole vectors, the last ones idle
    std::uint64_t* masks;  // [blocks, blockTokens] from this token on, written
    std::size_t blockTokens;
};

// Group-wise scales of Int8 weights: row k of W is multiplied by row k / channels of `rows`.
struct WeightScales {
    const float* rows = nullptr;   // [groups, rowStride of W]; null where W needs none
    std::size_t channels = 1;      // rows of W that share a scale
    const float* zeros = nullptr;  // [groups, rowStride], subtracted first, or null
};

// The cache that rows of W are prefetched into.
enum class Cache { kFIRST_LEVEL, kSECOND_LEVEL };

// Rows of W that one token keeps, against a tile of columns.
struct RowProduct {
    const void* w;             // first column of the tile in row 0 of W, its type
    std::size_t rowStride;     // O, elements
    const std::int32_t* rows;  // [count] rows of W, in accumulation order
    const float* values;       // [count]
    std::size_t count;
    std::size_t begin;  // the rows to add now; those up to the end of the list follow later
    std::size_t end;
    std::size_t columns;  // columns of the tile
    float* sums;          // [columns], set where begin is 0, else added to
    WeightScales scales;  // of the tile's first column
    Cache ahead;
};

// Factors and shifts of a token's sums.
struct TokenFactors {
    float nu;
    float eta;
};

// y = nu * (weightScale * sums) + eta * shiftWeight + bias, rounded once to T.
struct Epilogue {
    const float* sums;
    std::size_t columns;
    TokenFactors factors;
    const float* shiftWeight;  // [columns] or null (then eta does not matter)
    const void* bias;          // [columns] T or null
    void* y;                   // [columns] T
    const float* weightScale;  // [columns] of Int8 weights with a scale a column, or null
};

// All kept rows of many tokens, against a panel of columns narrow enough for registers.
struct PanelProduct {
    const void* w;          // first column of the panel in row 0 of W, its type
    std::size_t rowStride;  // O, elements
    std::size_t channels;   // K
    const float* kept;      // [blocks, blockTokens, keptStride], see KeptBlocks
    std::size_t keptStride;
    const std::uint64_t* keep;  // [blocks, blockTokens], bit i = position i of the block is kept
    std::size_t blockTokens;    // at least `tokens`: those of the run follow each other
    std::size_t tokens;
    std::size_t columns;  // at most kPANEL_VECTORS * lanes
    float* packed;        // scratch [kBLOCK * kPANEL_VECTORS * lanes], 64-byte aligned
    float* sums;          // scratch [tokens, kPANEL_VECTORS * lanes], 64-byte aligned
    WeightScales scales;  // of the panel's first column
    // Called with a token's sums as soon as they are complete.
    void (*finish)(const Epilogue& epilogue);
    Epilogue epilogue;            // without sums and factors; y is of the first token
    const TokenFactors* factors;  // [tokens]
    std::size_t yStride;          // bytes from a token's results to the next one's
    std::size_t yBytes;           // of a token's results
};

struct Variant {
    const char* name;
    std::size_t lanes;  // float32 values in a vector

    // z [channels] by position and the token's eta (0 without a dynamic shift).
    float (*loadToken[kELEMENT_TYPES])(const TokenInput& token, float* z);
    // Integer keys [channels] that order as the scores |z| * scale do: NaN on top, -0 as +0. The
    // scale is by position, or null.
    void (*scoreKeys)(const float* z, const float* scoreScale, std::size_t channels,
                      std::int32_t* keys);
    // Keep mask of each group: bit j = position j of the group is among the n largest keys.
    void (*selectGroups)(const std::int32_t* keys, std::size_t groups, int n, int m,
                         std::uint64_t* masks);
    // sqrt(var(z) / max(var(z where kept, else 0), floor)) of one token, z [count] by position.
    float (*varianceRatio)(const float* z, const std::uint64_t* keep, std::size_t count,
                           double floor);
    // Lists what one token keeps; how many that is.
    std::size_t (*listKept)(const KeptRows& kept);
    // Multiplies a token's values [channels] by scales of theirs.
    void (*scaleValues)(const float* scale, std::size_t channels, float* z);
    // Cuts what one token keeps into blocks.
    void (*cutKept)(const KeptBlocks& kept);
    void (*rowProduct[kWEIGHT_TYPES])(const RowProduct& product);
    void (*panelProduct[kWEIGHT_TYPES])(const PanelProduct& product);
    // For Int8 weights with group-wise scales.
    void (*scaledRowProduct)(const RowProduct& product);
    void (*scaledPanelProduct)(const PanelProduct& product);
    // The same with zero points.
    void (*shiftedRowProduct)(const RowProduct& product);
    void (*shiftedPanelProduct)(const PanelProduct& product);
    void (*epilogue[kELEMENT_TYPES])(const Epilogue& epilogue);
    // Reads memory in order, as fast as one thread can.
    std::uint64_t (*readWords)(const void* data, std::size_t bytes);
    // Norms, gated activations and attention.
    const StepFunctions* step;
};

const Variant& portableVariant();
// Null where the running processor, or the one compiled for, lacks the instructions.
const Variant* avx2Variant();
const Variant* avx512Variant();
const Variant* neonVariant();

// The fastest variant of this processor, or the one that useVariant chose.
const Variant& activeVariant();
// Chooses a variant by name, for tests and measurements; false where it cannot run here.
bool useVariant(const char* name);

// The cache that this processor multiplies the fastest from, or the one that useCacheAhead chose.
Cache cacheAhead();
void useCacheAhead(Cache cache);

}  // namespace nmexport
