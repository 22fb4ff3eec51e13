// Many tokens over all rows, each row read once. Included after dot_steps.inl.

namespace nmexport {
namespace {

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
    std::int32_t* zeros;  // or floats
    std::uint8_t* quads;

    float* floatZeros() const { return reinterpret_cast<float*>(zeros); }
};

// A step's scales or zero points as floats.
template <int kVECTORS, typename S>
inline void unpack(const S* from, float* to) {
    for (std::size_t at = 0; at < kVECTORS * Simd::kLANES; at += Simd::kLANES) {
        Simd::store(to + at, Simd::load(from + at));
    }
}

std::size_t packedBytes(std::size_t block) {
    return (2 + block / kQUAD) * PackedStep::kBYTES;
}

// Asks for rows of W a distance ahead, a quad at a time: asked for all at once they would hold up
// the loads of what is being multiplied.
template <Cache kCACHE>
class BlocksAhead {
  public:
    BlocksAhead(const TileDots& dots, const Steps& steps)
        : mDots(dots), mSteps(steps), mBlocks(dots.channels / dots.block) {
        for (std::size_t lines = 0; lines < kLINES_AHEAD; lines += dots.block) {
            for (std::size_t quad = 0; quad < dots.block / kQUAD; ++quad) askQuad(quad);
            advance();
        }
    }

    // Four rows of the block and the step whose turn it is.
    inline __attribute__((always_inline)) void askQuad(std::size_t quad) const {
        if (mPlace.block == mBlocks) return;
        const std::size_t stride = mDots.weights.rowBytes;
        const std::uint8_t* w = mDots.weights.w +
                                (mPlace.block * mDots.block + quad * kQUAD) * stride +
                                mPlace.step * kSTEP_BYTES;
        const bool isLast = mPlace.step + 1 == mSteps.count;
        for (std::size_t r = 0; r < kQUAD; ++r, w += stride) {
            ask<kCACHE>(w);
            // If rows do not begin with a line, a part of one ends in a line of its own.
            if (isLast) ask<kCACHE>(w + mSteps.last - 1);
        }
    }

    // After all quads of the block.
    void advance() {
        if (mPlace.block == mBlocks) return;
        if (mPlace.isNewGroup(mDots.weights)) {
            askScales<kCACHE>(mDots.weights, mPlace.group, mPlace.step);
        }
        mPlace.advance(mSteps.count, mDots.weights);
    }

  private:
    const TileDots& mDots;
    const Steps mSteps;
    const std::size_t mBlocks;
    Place mPlace;
};

template <IntegerFormat kFORMAT, typename S, bool kPARTIAL, typename Ahead>
inline __attribute__((always_inline)) void packStep(const TileDots& dots, std::size_t block,
                                                    std::size_t step, std::size_t bytes,
                                                    Ahead* ahead) {
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
        ahead->askQuad(quad);
        quadsOf<kFORMAT>(row, quads);
        std::uint8_t* to = packed.quads + quad * kVECTORS * kSTEP_BYTES;
        for (int v = 0; v < kVECTORS; ++v) Dot::store(to + v * kSTEP_BYTES, quads[v]);
    }
    const std::size_t group = block / weights.groupBlocks;
    if (weights.zeroPoints == ZeroPoints::kINTEGERS) {
        Simd::I zeros[kVECTORS];
        zeroPoints<kFORMAT, kPARTIAL>(weights.zero + group * weights.rowBytes + at, bytes, zeros);
        for (int v = 0; v < kVECTORS; ++v) {
            Simd::storeInt(packed.zeros + v * Simd::kLANES, zeros[v]);
        }
    }
    withTerms<S>(weights, [&](auto terms) __attribute__((always_inline)) {
        const Record<kFORMAT, S> record(weights, group, step);
        if constexpr (decltype(terms)::kHAS_SCALES) unpack<kVECTORS>(record.scales, packed.scales);
        if constexpr (decltype(terms)::kPOINTS != ZeroPoints::kNONE) {
            unpack<kVECTORS>(record.zeros, packed.floatZeros());
        }
    });
}

// Some tokens against four vectors of a packed step, from vector `first` on.
template <IntegerFormat kFORMAT, int kTOKENS>
inline __attribute__((always_inline)) void multiplyTile(const TileDots& dots, std::size_t block,
                                                        std::size_t token, int first, float* sums) {
    constexpr std::size_t kSTRIDE = static_cast<std::size_t>(vectorsOf(kFORMAT)) * kSTEP_BYTES;
    const PackedStep packed(dots.packed);
    const ZeroPoints zeroPoints = dots.weights.zeroPoints;
    const float* scales = dots.scales + block * dots.blockTokens + token;
    const std::int32_t* totals = dots.totals + block * dots.blockTokens + token;
    const std::int8_t* values = dots.values + token * dots.channels + block * dots.block;
    Simd::I dot[kTOKENS * 4];
    unroll<kTOKENS * 4>([&](auto i) __attribute__((always_inline)) {
        dot[i.kVALUE] = Simd::broadcastInt(startOf<kFORMAT>(zeroPoints, totals[i.kVALUE / 4]));
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
    const std::size_t column = static_cast<std::size_t>(first) * Simd::kLANES;
    if (zeroPoints == ZeroPoints::kINTEGERS) {
        unroll<kTOKENS * 4>([&](auto i) __attribute__((always_inline)) {
            constexpr std::size_t kAT = decltype(i)::kVALUE % 4 * Simd::kLANES;
            const Simd::I zero = Dot::load(packed.zeros + column + kAT);
            const Simd::I total = Simd::broadcastInt(totals[i.kVALUE / 4]);
            dot[i.kVALUE] = Dot::subtractProduct(dot[i.kVALUE], zero, total);
        });
    }
    withTerms<void>(dots.weights, [&](auto terms) __attribute__((always_inline)) {
        constexpr ZeroPoints kZEROS = decltype(terms)::kPOINTS;
        constexpr bool kSCALED = decltype(terms)::kHAS_SCALES;
        unroll<kTOKENS>([&](auto t) __attribute__((always_inline)) {
            const BlockFactors factors(scales[t.kVALUE], totals[t.kVALUE]);
            float* to = sums + t.kVALUE * dots.sumStride + column;
            unroll<4>([&](auto v) __attribute__((always_inline)) {
                constexpr std::size_t kAT = decltype(v)::kVALUE * Simd::kLANES;
                const Simd::F scale = loadIf<kSCALED>(packed.scales + column + kAT);
                const Simd::F zero =
                    loadIf<kZEROS != ZeroPoints::kNONE>(packed.floatZeros() + column + kAT);
                const Simd::I sum = dot[decltype(t)::kVALUE * 4 + decltype(v)::kVALUE];
                Simd::store(to + kAT, plusBlock<kZEROS, kSCALED>(Simd::load(to + kAT), sum, factors,
                                                                 scale, zero));
            });
        });
    });
}

template <IntegerFormat kFORMAT, int kTOKENS>
void multiplyTiles(const TileDots& dots, std::size_t block, std::size_t token, std::size_t step) {
    float* sums = dots.sums + token * dots.sumStride + step * stepColumns(kFORMAT);
    for (int first = 0; first < vectorsOf(kFORMAT); first += 4) {
        multiplyTile<kFORMAT, kTOKENS>(dots, block, token, first, sums);
    }
}

// Tokens of the next tile: as many as fit, unless that leaves one or two, which load as many
// vectors of W for fewer sums.
inline std::size_t tileTokens(std::size_t left) {
    constexpr std::size_t kMOST = kTILE_TOKENS;
    if (left >= kMOST && (kMOST < 4 || left == kMOST || left > kMOST + 2)) return kMOST;
    if (left >= 4 && kMOST >= 4) return 4;
    return left >= 2 ? 2 : 1;
}

template <IntegerFormat kFORMAT>
void multiplyStep(const TileDots& dots, std::size_t block, std::size_t step) {
    for (std::size_t t = 0; t < dots.tokens;) {
        const std::size_t tokens = tileTokens(dots.tokens - t);
        if (tokens == kTILE_TOKENS) {
            multiplyTiles<kFORMAT, kTILE_TOKENS>(dots, block, t, step);
        } else if (tokens == 4) {
            multiplyTiles<kFORMAT, 4>(dots, block, t, step);
        } else if (tokens == 2) {
            multiplyTiles<kFORMAT, 2>(dots, block, t, step);
        } else {
            multiplyTiles<kFORMAT, 1>(dots, block, t, step);
        }
        t += tokens;
    }
}

template <IntegerFormat kFORMAT, typename S>
void tileDots(const TileDots& dots) {
    const Steps steps(integerRowBytes(kFORMAT, dots.weights.columns));
    const std::size_t whole = steps.last < kSTEP_BYTES ? steps.count - 1 : steps.count;
    const std::size_t blocks = dots.channels / dots.block;
    std::memset(dots.sums, 0, dots.tokens * dots.sumStride * sizeof *dots.sums);
    BlocksAhead<Cache::kSECOND_LEVEL> ahead(dots, steps);
    for (std::size_t block = 0; block < blocks; ++block) {
        for (std::size_t step = 0; step < steps.count; ++step) {
            if (step < whole) {
                packStep<kFORMAT, S, false>(dots, block, step, kSTEP_BYTES, &ahead);
            } else {
                packStep<kFORMAT, S, true>(dots, block, step, steps.last, &ahead);
            }
            ahead.advance();
            multiplyStep<kFORMAT>(dots, block, step);
        }
    }
}

}  // namespace
}  // namespace nmexport
