// Products in integers: quantised weights against a token's values in 8 bits.
//
// A block is `activation_block` positions. In it a token's kept values are q * scale, q an integer
// of 8 bits; its product with the block's weights is an exact integer sum, in whatever order.
// Only the sums of blocks meet in floating point, and those in ascending order:
//
//   sum[o] = fma(scale[block] * weightScale[block, o], float(integerSum[block, o]), sum[o])
//
// So the bits depend neither on tokens, columns and threads nor on the instruction set. Where the
// weights have a scale an output, it waits for the end, and the product above has none.
//
// Integer zero points are part of the integer sum. Others meet the sum of the block's values,
// total:
//
//   kFLOATS    fma(-zeroPoint, float(total), float(integerSum))     in place of float(integerSum)
//   kMINIMA    sum[o] = fma(scale[block],
//                           fma(weightScale, float(integerSum), -(minimum * float(total))), sum[o])
//
// A minimum and a scale have 11 bits each: up to blocks of 64 positions minimum * total is exact,
// so that little is lost where the two differences nearly cancel.
//
// Four rows of W meet in one instruction: their bytes are interleaved, four to an output.
//
//   row a | a0 a1 a2 a3 ...        lanes, of 32 bits   | a0 b0 c0 d0 | a1 b1 c1 d1 | ...
//   row b | b0 b1 b2 b3 ...   ->   times, everywhere   | qa qb qc qd | qa qb qc qd | ...
//   row c | c0 c1 c2 c3 ...
//   row d | d0 d1 d2 d3 ...
//
// Interleaving leaves the outputs of a step in an order of its own (see restoreOrder): sums stay
// in it until they are complete.
#pragma once

#include <cstddef>
#include <cstdint>

#include "element.h"
#include "variant.h"

namespace nmexport {

// How integers lie in a row of W.
enum class IntegerFormat { kINT8 = 0, kINT4 = 1, kUINT4 = 2 };
constexpr int kINTEGER_FORMATS = 3;

constexpr IntegerFormat integerFormatOf(WeightType type) {
    if (type == WeightType::kINT8) return IntegerFormat::kINT8;
    return type == WeightType::kINT4 ? IntegerFormat::kINT4 : IntegerFormat::kUINT4;
}

// Columns of a step of so many bytes.
constexpr std::size_t columnsOfStep(IntegerFormat format, std::size_t bytes) {
    return format == IntegerFormat::kINT8 ? bytes : 2 * bytes;
}

// Scales of groups are float32 or float16.
constexpr int kSCALE_TYPES = 2;

constexpr std::size_t integerRowBytes(IntegerFormat format, std::size_t columns) {
    return format == IntegerFormat::kINT8 ? columns : columns / 2;
}

// Rows that meet in one instruction.
constexpr std::size_t kQUAD = 4;
// Integer sums stay within 32 bits in blocks up to this many positions.
constexpr std::size_t kMOST_BLOCK = 65536;

// The part of W, its scales and its zero points that belongs to a tile of columns.
struct IntegerWeights {
    const std::uint8_t* w;    // first byte of the tile in row 0
    std::size_t rowBytes;     // of a whole row of W
    std::size_t columns;      // of the tile; it begins at a whole byte
    const char* records;      // of the tile's first step in group 0, see GroupScales; or null
    std::size_t recordBytes;  // of a step
    std::size_t groupBytes;   // from a group's records to the next one's
    ZeroPoints zeroPoints;
    const std::uint8_t* zero;  // kINTEGERS: rows like W's, a group each, from the tile on
    std::size_t groupBlocks;   // blocks that share scales and zero points
};

// The kept values of one token, quantised: quads of its rows, block by block. The last quad of a
// block is filled up with rows of zeros.
struct QuantisedRows {
    const std::size_t* offsets;  // [quads, kQUAD] bytes from row 0 of W
    const std::int32_t* words;   // [quads] four values of 8 bits each
    const std::size_t* ends;     // [blocks] quads up to the end of the block
    const float* scales;         // [blocks]
    const std::int32_t* totals;  // [blocks] sum of the values
};

// Tokens of a RowDots at most: each reads its own rows.
constexpr std::size_t kMOST_ROW_TOKENS = 3;

// A few tokens against a tile, each over the rows that it keeps.
struct RowDots {
    IntegerWeights weights;
    QuantisedRows tokens[kMOST_ROW_TOKENS];
    std::size_t tokenCount;
    std::size_t blocks;
    Cache ahead;
    float* sums;            // [tokenCount, sumStride], written
    std::size_t sumStride;  // whole steps
};

// Many tokens against a tile: every row is read once, and a token has zeros where it keeps nothing.
struct TileDots {
    IntegerWeights weights;
    std::size_t channels;
    std::size_t block;           // positions
    const std::int8_t* values;   // [tokens, channels]
    const float* scales;         // [channels / block, blockTokens]
    const std::int32_t* totals;  // the same
    std::size_t blockTokens;     // at least `tokens`
    std::size_t tokens;
    std::uint8_t* packed;  // scratch, 64-byte aligned, see packedBytes
    float* sums;           // [tokens, sumStride], written
    std::size_t sumStride;
};

// Values to quantise with one scale.
struct ValueBlock {
    const float* values;
    const std::uint64_t* keep;  // bit p = value p counts, else it is zero; null: all count
    std::size_t first;          // the block's first value, and how many: multiples of 16
    std::size_t count;
};

// Kernels of one instruction set.
struct DotKernels {
    const char* name;
    std::size_t stepBytes;  // bytes of a row that are multiplied together
    // Bytes of scratch that a block of so many positions takes.
    std::size_t (*packedBytes)(std::size_t block);
    // Quantises a block to [count] bytes and their sum. Returns the scale: NaN where a value is NaN
    // or infinite, so that it stays visible.
    float (*quantise)(const ValueBlock& block, std::int8_t* to, std::int32_t* total);
    void (*rowDots[kINTEGER_FORMATS][kSCALE_TYPES])(const RowDots& dots);
    void (*tileDots[kINTEGER_FORMATS][kSCALE_TYPES])(const TileDots& dots);
    // Puts whole steps from the order of columns into that of sums ...
    void (*arrange[kINTEGER_FORMATS])(float* values, std::size_t count);
    // ... and back.
    void (*restoreOrder[kINTEGER_FORMATS])(float* sums, std::size_t count);
};

const DotKernels& portableDots();
// Null where the running processor, or the one compiled for, lacks the instructions.
const DotKernels* avx2Dots();
const DotKernels* avxVnniDots();
const DotKernels* avx512VnniDots();
const DotKernels* neonDots();
const DotKernels* neonDotProductDots();

// The fastest kernels that go with the active variant, or those that useDots chose since.
const DotKernels& activeDots();
// Chooses kernels by name, for tests and measurements; false where they cannot run here.
bool useDots(const char* name);

}  // namespace nmexport
