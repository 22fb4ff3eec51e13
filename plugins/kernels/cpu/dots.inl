// The integer products. Included by each instruction set after its Simd and its Dot.

namespace nmexport {
namespace {

constexpr std::size_t kSTEP_BYTES = Simd::kLANES * kQUAD;
// Cache lines asked for before their turn: what a core's share of the bandwidth holds in flight,
// and to spare (measured).
constexpr std::size_t kLINES_AHEAD = 192;
constexpr std::size_t kLINE = 64;
// Tokens of a tile whose sums, with a row's vectors, fit the registers.
constexpr int kTILE_TOKENS = Simd::kREGISTERS > 16 ? 6 : 2;

// Calls body(Index<0>{}) to body(Index<kCOUNT - 1>{}): what it indexes stays in registers.
template <int kI>
struct Index {
    static constexpr int kVALUE = kI;
};

template <typename Body, int... kINDEX>
inline __attribute__((always_inline)) void unroll(const Body& body,
                                                  std::integer_sequence<int, kINDEX...>) {
    (body(Index<kINDEX>{}), ...);
}

template <int kCOUNT, typename Body>
inline __attribute__((always_inline)) void unroll(const Body& body) {
    unroll(body, std::make_integer_sequence<int, kCOUNT>{});
}

// Vectors that four rows become, and the columns they stand for.
constexpr int vectorsOf(IntegerFormat format) {
    return format == IntegerFormat::kINT8 ? 4 : 8;
}

constexpr std::size_t stepColumns(IntegerFormat format) {
    return static_cast<std::size_t>(vectorsOf(format)) * Simd::kLANES;
}

// What stored bits are xored with, so that they are numbers that a Dot takes; and by how much they
// then exceed the integers that they stand for.
constexpr std::uint8_t flipOf(IntegerFormat format) {
    if (format == IntegerFormat::kINT8) return Dot::kUNSIGNED ? 0x80 : 0;
    return format == IntegerFormat::kINT4 ? 0x88 : 0;
}

constexpr std::int32_t excessOf(IntegerFormat format) {
    if (format == IntegerFormat::kINT8) return Dot::kUNSIGNED ? 128 : 0;
    return format == IntegerFormat::kINT4 ? 8 : 0;
}

// Bytes of a row from an address on; past `count` zeros.
template <IntegerFormat kFORMAT, bool kPARTIAL>
inline __attribute__((always_inline)) Simd::I loadBytes(const std::uint8_t* from,
                                                        std::size_t count) {
    Simd::I bytes;
    if constexpr (kPARTIAL) {
        bytes = Dot::loadPartial(from, count);
    } else {
        bytes = Dot::load(from);
    }
    if constexpr (flipOf(kFORMAT) != 0) bytes = Dot::flip(bytes, flipOf(kFORMAT));
    return bytes;
}

// Four rows' bytes as quads: a lane an output.
template <IntegerFormat kFORMAT>
inline __attribute__((always_inline)) void quadsOf(const Simd::I* rows, Simd::I* quads) {
    Dot::interleave(rows, quads);
    if constexpr (kFORMAT != IntegerFormat::kINT8) {
        for (int v = 0; v < 4; ++v) {
            quads[4 + v] = Dot::highNibbles(quads[v]);
            quads[v] = Dot::lowNibbles(quads[v]);
        }
    }
}

// The zero points of a step, a lane an output, in excess like the weights.
template <IntegerFormat kFORMAT, bool kPARTIAL>
inline void zeroPoints(const std::uint8_t* from, std::size_t count, Simd::I* zeros) {
    const Simd::I row = loadBytes<kFORMAT, kPARTIAL>(from, count);
    const Simd::I rows[4] = {row, row, row, row};
    quadsOf<kFORMAT>(rows, zeros);
    for (int v = 0; v < vectorsOf(kFORMAT); ++v) zeros[v] = Dot::firstBytes(zeros[v]);
}

// A step's scales in the order of the sums; past the last column they do not matter.
template <IntegerFormat kFORMAT, typename S>
inline __attribute__((always_inline)) void scalesOf(const S* from, std::size_t columns,
                                                    Simd::F* scales) {
    constexpr std::size_t kLANES = Simd::kLANES;
    for (int v = 0; v < vectorsOf(kFORMAT); ++v) {
        const std::size_t at = static_cast<std::size_t>(v) * kLANES;
        if (at + kLANES <= columns) {
            scales[v] = Simd::load(from + at);
        } else if (at < columns) {
            scales[v] = Simd::loadPartial(from + at, static_cast<int>(columns - at));
        } else {
            scales[v] = Simd::broadcast(0.0f);
        }
    }
    Dot::shuffle<vectorsOf(kFORMAT)>(scales);
}

// What integer sums begin with: it takes the weights' excess away again.
template <IntegerFormat kFORMAT>
inline std::int32_t startOf(bool hasZeros, std::int32_t total) {
    // Zero points are in excess as well, so that the two cancel.
    return hasZeros
               ? 0
               : static_cast<std::int32_t>(0u - static_cast<std::uint32_t>(total) *
                                                    static_cast<std::uint32_t>(excessOf(kFORMAT)));
}

// A tile cut into steps.
struct Steps {
    std::size_t count;  // the last one included
    std::size_t last;   // bytes of the last one

    explicit Steps(std::size_t bytes)
        : count((bytes + kSTEP_BYTES - 1) / kSTEP_BYTES), last(bytes - (count - 1) * kSTEP_BYTES) {}

    std::size_t bytesOf(std::size_t step) const { return step + 1 < count ? kSTEP_BYTES : last; }
};

template <Cache kCACHE>
inline __attribute__((always_inline)) void ask(const void* address) {
    if constexpr (kCACHE == Cache::kFIRST_LEVEL) {
        Simd::prefetch(address);
    } else {
        Simd::prefetchFar(address);
    }
}

// Asks for the scales and zero points of a step.
template <IntegerFormat kFORMAT, typename S, Cache kCACHE>
inline __attribute__((always_inline)) void askScales(const IntegerWeights& weights,
                                                     std::size_t group, std::size_t step) {
    const S* from = static_cast<const S*>(weights.scale) + group * weights.scaleStride +
                    step * stepColumns(kFORMAT);
    constexpr std::size_t kBYTES = stepColumns(kFORMAT) * sizeof(S);
    const char* bytes = reinterpret_cast<const char*>(from);
    for (std::size_t at = 0; at < kBYTES; at += kLINE) ask<kCACHE>(bytes + at);
    ask<kCACHE>(bytes + kBYTES - 1);
    if (weights.zero != nullptr) {
        ask<kCACHE>(weights.zero + group * weights.rowBytes + step * kSTEP_BYTES);
    }
}

// Where it is asked for next: step after step, block after block.
struct Place {
    std::size_t block = 0;
    std::size_t step = 0;
    std::size_t group = 0;
    std::size_t groupBlock = 0;  // of the group

    // The first block of a group, where groups have scales.
    bool isNewGroup(const IntegerWeights& weights) const {
        return weights.scale != nullptr && groupBlock == 0;
    }

    void advance(std::size_t steps, const IntegerWeights& weights) {
        if (++step < steps) return;
        step = 0;
        ++block;
        if (++groupBlock == weights.groupBlocks) {
            groupBlock = 0;
            ++group;
        }
    }
};

// One token's kept rows of one block against one step.
template <IntegerFormat kFORMAT, typename S, bool kPARTIAL>
inline __attribute__((always_inline)) void addBlock(const IntegerWeights& weights,
                                                    const QuantisedRows& rows, std::size_t block,
                                                    std::size_t group, std::size_t step,
                                                    std::size_t bytes, float* sums) {
    constexpr int kVECTORS = vectorsOf(kFORMAT);
    const std::size_t at = step * kSTEP_BYTES;
    const std::uint8_t* w = weights.w + at;
    const std::int32_t total = rows.totals[block];
    const bool hasZeros = weights.zero != nullptr;
    Simd::I dot[kVECTORS];
    for (int v = 0; v < kVECTORS; ++v) {
        dot[v] = Simd::broadcastInt(startOf<kFORMAT>(hasZeros, total));
    }
    const std::size_t end = rows.ends[block];
    for (std::size_t quad = block == 0 ? 0 : rows.ends[block - 1]; quad < end; ++quad) {
        const std::size_t* offsets = rows.offsets + quad * kQUAD;
        Simd::I row[kQUAD], quads[kVECTORS];
        for (std::size_t r = 0; r < kQUAD; ++r) {
            row[r] = loadBytes<kFORMAT, kPARTIAL>(w + offsets[r], bytes);
        }
        quadsOf<kFORMAT>(row, quads);
        const Dot::Word word = Dot::word(rows.words[quad]);
        for (int v = 0; v < kVECTORS; ++v) dot[v] = Dot::add<kFORMAT>(dot[v], quads[v], word);
    }

    if (hasZeros) {
        Simd::I zeros[kVECTORS];
        zeroPoints<kFORMAT, kPARTIAL>(weights.zero + group * weights.rowBytes + at, bytes, zeros);
        const Simd::I factor = Simd::broadcastInt(total);
        for (int v = 0; v < kVECTORS; ++v) {
            dot[v] = Dot::subtractProduct(dot[v], zeros[v], factor);
        }
    }
    const Simd::F scale = Simd::broadcast(rows.scales[block]);
    Simd::F scales[kVECTORS];
    if (weights.scale != nullptr) {
        const std::size_t column = step * stepColumns(kFORMAT);
        scalesOf<kFORMAT>(
            static_cast<const S*>(weights.scale) + group * weights.scaleStride + column,
            kPARTIAL ? weights.columns - column : stepColumns(kFORMAT), scales);
        for (int v = 0; v < kVECTORS; ++v) scales[v] = Simd::mul(scale, scales[v]);
    } else {
        for (int v = 0; v < kVECTORS; ++v) scales[v] = scale;
    }
    float* to = sums + step * stepColumns(kFORMAT);
    for (int v = 0; v < kVECTORS; ++v) {
        const Simd::F before = Simd::load(to + v * Simd::kLANES);
        Simd::store(to + v * Simd::kLANES, Simd::fma(scales[v], Dot::toFloat(dot[v]), before));
    }
}

// Asks for kept rows a distance ahead of where they are multiplied, block after block.
template <IntegerFormat kFORMAT, typename S, Cache kCACHE>
class RowsAhead {
  public:
    RowsAhead(const RowDots& dots, const Steps& steps) : mDots(dots), mSteps(steps) {
        std::size_t lines = 0;
        while (lines < kLINES_AHEAD && mPlace.block < mDots.blocks) lines += next();
    }

    // One step of a block more; how many lines that were.
    inline __attribute__((always_inline)) std::size_t next() {
        if (mPlace.block == mDots.blocks) return 1;
        const std::size_t block = mPlace.block;
        // Where rows do not begin with a line, a part of one ends in a line of its own.
        const bool isLast = mPlace.step + 1 == mSteps.count;
        const std::uint8_t* w = mDots.weights.w + mPlace.step * kSTEP_BYTES;
        std::size_t lines = 1;
        for (std::size_t t = 0; t < mDots.tokenCount; ++t) {
            const QuantisedRows& rows = mDots.tokens[t];
            const std::size_t begin = block == 0 ? 0 : rows.ends[block - 1];
            const std::size_t* last = rows.offsets + rows.ends[block] * kQUAD;
            for (const std::size_t* row = rows.offsets + begin * kQUAD; row < last; row += kQUAD) {
                for (std::size_t r = 0; r < kQUAD; ++r) ask<kCACHE>(w + row[r]);
                lines += kQUAD;
                if (!isLast) continue;
                for (std::size_t r = 0; r < kQUAD; ++r) ask<kCACHE>(w + row[r] + mSteps.last - 1);
            }
        }
        if (mPlace.isNewGroup(mDots.weights)) {
            askScales<kFORMAT, S, kCACHE>(mDots.weights, mPlace.group, mPlace.step);
        }
        mPlace.advance(mSteps.count, mDots.weights);
        return lines;
    }

  private:
    const RowDots& mDots;
    const Steps mSteps;
    Place mPlace;
};

template <IntegerFormat kFORMAT, typename S, Cache kCACHE>
void rowDotsAhead(const RowDots& dots) {
    const IntegerWeights& weights = dots.weights;
    const Steps steps(integerRowBytes(kFORMAT, weights.columns));
    const bool endsShort = steps.last < kSTEP_BYTES;
    const std::size_t whole = endsShort ? steps.count - 1 : steps.count;
    std::memset(dots.sums, 0, dots.tokenCount * dots.sumStride * sizeof *dots.sums);
    RowsAhead<kFORMAT, S, kCACHE> ahead(dots, steps);
    for (std::size_t block = 0; block < dots.blocks; ++block) {
        const std::size_t group = block / weights.groupBlocks;
        for (std::size_t step = 0; step < whole; ++step) {
            ahead.next();
            for (std::size_t t = 0; t < dots.tokenCount; ++t) {
                addBlock<kFORMAT, S, false>(weights, dots.tokens[t], block, group, step,
                                            kSTEP_BYTES, dots.sums + t * dots.sumStride);
            }
        }
        if (!endsShort) continue;
        ahead.next();
        for (std::size_t t = 0; t < dots.tokenCount; ++t) {
            addBlock<kFORMAT, S, true>(weights, dots.tokens[t], block, group, whole, steps.last,
                                       dots.sums + t * dots.sumStride);
        }
    }
}

template <IntegerFormat kFORMAT, typename S>
void rowDots(const RowDots& dots) {
    if (dots.ahead == Cache::kFIRST_LEVEL) {
        rowDotsAhead<kFORMAT, S, Cache::kFIRST_LEVEL>(dots);
    } else {
        rowDotsAhead<kFORMAT, S, Cache::kSECOND_LEVEL>(dots);
    }
}

// One step of a block of W, interleaved, with its scales and zero points: what many tokens meet.
//
//   packed | scales [8 vectors] | zero points [8 vectors] | quads [positions / 4, vectors] |
struct PackedStep {
    explicit PackedStep(std::uint8_t* memory)
        : scales(reinterpret_cast<float*>(memory)),
          zeros(reinterpret_cast<std::int32_t*>(memory + kBYTES)),
          quads(memory + 2 * kBYTES) {}

    static constexpr std::size_t kBYTES = 8 * kSTEP_BYTES;
    float* scales;
    std::int32_t* zeros;
    std::uint8_t* quads;
};

std::size_t packedBytes(std::size_t block) {
    return (2 + block / kQUAD) * PackedStep::kBYTES;
}

template <IntegerFormat kFORMAT, typename S, bool kPARTIAL>
inline __attribute__((always_inline)) void packStep(const TileDots& dots, std::size_t block,
                                                    std::size_t step, std::size_t bytes) {
    constexpr int kVECTORS = vectorsOf(kFORMAT);
    const IntegerWeights& weights = dots.weights;
    const PackedStep packed(dots.packed);
    const std::size_t at = step * kSTEP_BYTES;
    const std::uint8_t* w = weights.w + block * dots.block * weights.rowBytes + at;
    for (std::size_t quad = 0; quad < dots.block / kQUAD; ++quad) {
        Simd::I row[kQUAD], quads[kVECTORS];
        for (std::size_t r = 0; r < kQUAD; ++r) {
            row[r] = loadBytes<kFORMAT, kPARTIAL>(w, bytes);
            w += weights.rowBytes;
        }
        quadsOf<kFORMAT>(row, quads);
        std::uint8_t* to = packed.quads + quad * kVECTORS * kSTEP_BYTES;
        for (int v = 0; v < kVECTORS; ++v) Dot::store(to + v * kSTEP_BYTES, quads[v]);
    }
    const std::size_t group = block / weights.groupBlocks;
    if (weights.zero != nullptr) {
        Simd::I zeros[kVECTORS];
        zeroPoints<kFORMAT, kPARTIAL>(weights.zero + group * weights.rowBytes + at, bytes, zeros);
        for (int v = 0; v < kVECTORS; ++v) {
            Simd::storeInt(packed.zeros + v * Simd::kLANES, zeros[v]);
        }
    }
    if (weights.scale != nullptr) {
        const std::size_t column = step * stepColumns(kFORMAT);
        Simd::F scales[kVECTORS];
        scalesOf<kFORMAT>(
            static_cast<const S*>(weights.scale) + group * weights.scaleStride + column,
            kPARTIAL ? weights.columns - column : stepColumns(kFORMAT), scales);
        for (int v = 0; v < kVECTORS; ++v) {
            Simd::store(packed.scales + v * Simd::kLANES, scales[v]);
        }
    }
}

// Some tokens against four vectors of a packed step, from vector `first` on.
template <IntegerFormat kFORMAT, int kTOKENS>
inline __attribute__((always_inline)) void multiplyTile(const TileDots& dots, std::size_t block,
                                                        std::size_t token, int first, float* sums) {
    constexpr std::size_t kSTRIDE = static_cast<std::size_t>(vectorsOf(kFORMAT)) * kSTEP_BYTES;
    const PackedStep packed(dots.packed);
    const bool hasZeros = dots.weights.zero != nullptr;
    const bool hasScales = dots.weights.scale != nullptr;
    const float* scales = dots.scales + block * dots.blockTokens + token;
    const std::int32_t* totals = dots.totals + block * dots.blockTokens + token;
    const std::int8_t* values = dots.values + token * dots.channels + block * dots.block;
    Simd::I dot[kTOKENS * 4];
    unroll<kTOKENS * 4>([&](auto i) __attribute__((always_inline)) {
        dot[i.kVALUE] = Simd::broadcastInt(startOf<kFORMAT>(hasZeros, totals[i.kVALUE / 4]));
    });
    const std::uint8_t* from = packed.quads + static_cast<std::size_t>(first) * kSTEP_BYTES;
    for (std::size_t k = 0; k < dots.block; k += kQUAD, from += kSTRIDE) {
        Simd::I w[4];
        unroll<4>([&](auto v) __attribute__((always_inline)) {
            w[v.kVALUE] = Dot::load(from + v.kVALUE * kSTEP_BYTES);
        });
        unroll<kTOKENS>([&](auto t) __attribute__((always_inline)) {
            std::int32_t bits;
            std::memcpy(&bits, values + t.kVALUE * dots.channels + k, sizeof bits);
            const Dot::Word word = Dot::word(bits);
            unroll<4>([&](auto v) __attribute__((always_inline)) {
                constexpr int kI = decltype(t)::kVALUE * 4 + decltype(v)::kVALUE;
                dot[kI] = Dot::add<kFORMAT>(dot[kI], w[v.kVALUE], word);
            });
        });
    }
    unroll<kTOKENS * 4>([&](auto i) __attribute__((always_inline)) {
        constexpr int kT = decltype(i)::kVALUE / 4, kV = decltype(i)::kVALUE % 4;
        const std::size_t at = static_cast<std::size_t>(first + kV) * Simd::kLANES;
        Simd::I sum = dot[i.kVALUE];
        if (hasZeros) {
            const Simd::I total = Simd::broadcastInt(totals[kT]);
            sum = Dot::subtractProduct(sum, Dot::load(packed.zeros + at), total);
        }
        Simd::F factor = Simd::broadcast(scales[kT]);
        if (hasScales) factor = Simd::mul(factor, Simd::load(packed.scales + at));
        float* to = sums + kT * dots.sumStride + at;
        Simd::store(to, Simd::fma(factor, Dot::toFloat(sum), Simd::load(to)));
    });
}

template <IntegerFormat kFORMAT, int kTOKENS>
void multiplyTiles(const TileDots& dots, std::size_t block, std::size_t token, std::size_t step) {
    float* sums = dots.sums + token * dots.sumStride + step * stepColumns(kFORMAT);
    for (int first = 0; first < vectorsOf(kFORMAT); first += 4) {
        multiplyTile<kFORMAT, kTOKENS>(dots, block, token, first, sums);
    }
}

// All tokens, in tiles of nearly equal size.
template <IntegerFormat kFORMAT>
void multiplyStep(const TileDots& dots, std::size_t block, std::size_t step) {
    std::size_t t = 0;
    while (t < dots.tokens) {
        const int left = static_cast<int>(dots.tokens - t);
        if (left >= kTILE_TOKENS && left != kTILE_TOKENS + 1) {
            multiplyTiles<kFORMAT, kTILE_TOKENS>(dots, block, t, step);
            t += static_cast<std::size_t>(kTILE_TOKENS);
        } else if (left >= 4) {
            multiplyTiles<kFORMAT, 4>(dots, block, t, step);
            t += 4;
        } else if (left >= 2) {
            multiplyTiles<kFORMAT, 2>(dots, block, t, step);
            t += 2;
        } else {
            multiplyTiles<kFORMAT, 1>(dots, block, t, step);
            t += 1;
        }
    }
}

// Asks for whole blocks of W a distance ahead.
template <IntegerFormat kFORMAT, typename S, Cache kCACHE>
class BlocksAhead {
  public:
    BlocksAhead(const TileDots& dots, const Steps& steps)
        : mDots(dots), mSteps(steps), mBlocks(dots.channels / dots.block) {
        for (std::size_t lines = 0; lines < kLINES_AHEAD; lines += dots.block) next();
    }

    void next() {
        if (mPlace.block == mBlocks) return;
        const IntegerWeights& weights = mDots.weights;
        const std::uint8_t* w =
            weights.w + mPlace.block * mDots.block * weights.rowBytes + mPlace.step * kSTEP_BYTES;
        const bool isLast = mPlace.step + 1 == mSteps.count;
        for (std::size_t k = 0; k < mDots.block; ++k, w += weights.rowBytes) {
            ask<kCACHE>(w);
            if (isLast) ask<kCACHE>(w + mSteps.last - 1);
        }
        if (mPlace.isNewGroup(weights)) {
            askScales<kFORMAT, S, kCACHE>(weights, mPlace.group, mPlace.step);
        }
        mPlace.advance(mSteps.count, weights);
    }

  private:
    const TileDots& mDots;
    const Steps mSteps;
    const std::size_t mBlocks;
    Place mPlace;
};

template <IntegerFormat kFORMAT, typename S>
void tileDots(const TileDots& dots) {
    const Steps steps(integerRowBytes(kFORMAT, dots.weights.columns));
    const std::size_t whole = steps.last < kSTEP_BYTES ? steps.count - 1 : steps.count;
    const std::size_t blocks = dots.channels / dots.block;
    std::memset(dots.sums, 0, dots.tokens * dots.sumStride * sizeof *dots.sums);
    BlocksAhead<kFORMAT, S, Cache::kSECOND_LEVEL> ahead(dots, steps);
    for (std::size_t block = 0; block < blocks; ++block) {
        for (std::size_t step = 0; step < steps.count; ++step) {
            ahead.next();
            if (step < whole) {
                packStep<kFORMAT, S, false>(dots, block, step, kSTEP_BYTES);
            } else {
                packStep<kFORMAT, S, true>(dots, block, step, steps.last);
            }
            multiplyStep<kFORMAT>(dots, block, step);
        }
    }
}

template <IntegerFormat kFORMAT>
void restoreOrder(float* sums, std::size_t count) {
    constexpr int kVECTORS = vectorsOf(kFORMAT);
    for (std::size_t at = 0; at < count; at += stepColumns(kFORMAT)) {
        Simd::F v[kVECTORS];
        for (int i = 0; i < kVECTORS; ++i) v[i] = Simd::load(sums + at + i * Simd::kLANES);
        Dot::unshuffle<kVECTORS>(v);
        for (int i = 0; i < kVECTORS; ++i) Simd::store(sums + at + i * Simd::kLANES, v[i]);
    }
}

constexpr std::size_t kCHUNK = 16;
using Floats = float __attribute__((vector_size(kCHUNK * sizeof(float))));
using Ints = std::int32_t __attribute__((vector_size(kCHUNK * sizeof(std::int32_t))));
using Bytes = std::int8_t __attribute__((vector_size(kCHUNK)));

// Values as bits, and zeros where they are not kept.
inline void keptBits(const float* values, const std::uint64_t* keep, std::size_t position,
                     Ints* bits) {
    constexpr Ints kBIT = {1 << 0, 1 << 1, 1 << 2,  1 << 3,  1 << 4,  1 << 5,  1 << 6,  1 << 7,
                           1 << 8, 1 << 9, 1 << 10, 1 << 11, 1 << 12, 1 << 13, 1 << 14, 1 << 15};
    std::memcpy(bits, values + position, sizeof *bits);
    if (keep == nullptr) return;
    const std::int32_t mask = static_cast<std::int32_t>(keep[position / 64] >> (position % 64));
    *bits &= (kBIT & mask) != 0;
}

// The largest magnitude as bits: those of positive floats order as integers do, NaN on top.
inline std::int32_t largestBits(const ValueBlock& block) {
    Ints most{};
    for (std::size_t k = block.first; k < block.first + block.count; k += kCHUNK) {
        Ints bits;
        keptBits(block.values, block.keep, k, &bits);
        bits &= 0x7fffffff;
        most = bits > most ? bits : most;
    }
    std::int32_t largest = 0;
    for (std::size_t i = 0; i < kCHUNK; ++i) largest = most[i] > largest ? most[i] : largest;
    return largest;
}

float quantise(const ValueBlock& block, std::int8_t* to, std::int32_t* total) {
    constexpr std::int32_t kINFINITY_BITS = 0x7f800000;
    // Adding it rounds to an integer, half to even, whose 8 bits are then the lowest of the sum.
    constexpr float kROUNDING = 12582912.0f;  // 1.5 * 2^23
    const std::int32_t bits = largestBits(block);
    *total = 0;
    if (bits == 0 || bits >= kINFINITY_BITS) {
        std::memset(to, 0, block.count);
        return bits == 0 ? 0.0f : floatOf(0x7fc00000u);
    }
    const float largest = floatOf(static_cast<std::uint32_t>(bits));
    // So that 127 times the largest is no infinity; what turns to zero thereby is one anyway.
    const float shrink = largest > 0x1p100f ? 0x1p-16f : 1.0f;
    Ints sums{};
    for (std::size_t k = 0; k < block.count; k += kCHUNK) {
        Ints kept;
        keptBits(block.values, block.keep, block.first + k, &kept);
        Floats value;
        std::memcpy(&value, &kept, sizeof value);
        const Floats rounded = value * shrink * 127.0f / (largest * shrink) + kROUNDING;
        Ints whole;
        std::memcpy(&whole, &rounded, sizeof whole);
        whole -= static_cast<std::int32_t>(0x4b400000);  // the bits of kROUNDING
        sums += whole;
        const Bytes bytes = __builtin_convertvector(whole, Bytes);
        std::memcpy(to + k, &bytes, sizeof bytes);
    }
    for (std::size_t i = 0; i < kCHUNK; ++i) *total += sums[i];
    return largest / 127.0f;
}

constexpr DotKernels makeDots(const char* name) {
    constexpr IntegerFormat kINT8 = IntegerFormat::kINT8;
    constexpr IntegerFormat kINT4 = IntegerFormat::kINT4;
    constexpr IntegerFormat kUINT4 = IntegerFormat::kUINT4;
    return DotKernels{
        name,
        kSTEP_BYTES,
        packedBytes,
        quantise,
        {{rowDots<kINT8, float>, rowDots<kINT8, Float16>, rowDots<kINT8, BFloat16>},
         {rowDots<kINT4, float>, rowDots<kINT4, Float16>, rowDots<kINT4, BFloat16>},
         {rowDots<kUINT4, float>, rowDots<kUINT4, Float16>, rowDots<kUINT4, BFloat16>}},
        {{tileDots<kINT8, float>, tileDots<kINT8, Float16>, tileDots<kINT8, BFloat16>},
         {tileDots<kINT4, float>, tileDots<kINT4, Float16>, tileDots<kINT4, BFloat16>},
         {tileDots<kUINT4, float>, tileDots<kUINT4, Float16>, tileDots<kUINT4, BFloat16>}},
        {restoreOrder<kINT8>, restoreOrder<kINT4>, restoreOrder<kUINT4>},
    };
}

}  // namespace
}  // namespace nmexport
