// A few tokens, each over the rows that it keeps. Included after dot_steps.inl.

namespace nmexport {
namespace {

// True if a step's odd columns are multiplied in the upper half of whole bytes: what the lower half
// adds is taken away once a block, which saves two instructions of three for every vector.
template <IntegerFormat kFORMAT>
constexpr bool kWHOLE_BYTES = Dot::kTAKES_BYTES && kFORMAT != IntegerFormat::kINT8;

// The start of a vector of integer sums.
template <IntegerFormat kFORMAT>
inline std::int32_t quadStart(ZeroPoints zeroPoints, std::int32_t total, int vector) {
    const std::int32_t start = startOf<kFORMAT>(zeroPoints, total);
    return kWHOLE_BYTES<kFORMAT> && vector >= 4 ? 17 * start : start;
}

// Four rows and a token's values for them.
template <IntegerFormat kFORMAT>
inline __attribute__((always_inline)) void addQuad(const Simd::I* row, const Dot::Word& word,
                                                   Simd::I* dot) {
    constexpr int kVECTORS = vectorsOf(kFORMAT);
    Simd::I quads[kVECTORS];
    if constexpr (kWHOLE_BYTES<kFORMAT>) {
        Dot::interleave(row, quads);
        for (int v = 0; v < 4; ++v) {
            dot[v] = Dot::add<kFORMAT>(dot[v], Dot::lowNibbles(quads[v]), word);
            dot[4 + v] = Dot::add<kFORMAT>(dot[4 + v], quads[v], word);
        }
    } else {
        quadsOf<kFORMAT>(row, quads);
        for (int v = 0; v < kVECTORS; ++v) dot[v] = Dot::add<kFORMAT>(dot[v], quads[v], word);
    }
}

// After all quads of a block.
template <IntegerFormat kFORMAT, typename D = Dot>
inline __attribute__((always_inline)) void finishQuads(Simd::I* dot) {
    if constexpr (kWHOLE_BYTES<kFORMAT>) {
        for (int v = 0; v < 4; ++v) dot[4 + v] = D::upperPart(dot[4 + v], dot[v]);
    }
}

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
    Simd::I dot[kVECTORS];
    for (int v = 0; v < kVECTORS; ++v) {
        dot[v] = Simd::broadcastInt(quadStart<kFORMAT>(weights.zeroPoints, total, v));
    }
    const std::size_t end = rows.ends[block];
    for (std::size_t quad = block == 0 ? 0 : rows.ends[block - 1]; quad < end; ++quad) {
        const std::size_t* offsets = rows.offsets + quad * kQUAD;
        Simd::I row[kQUAD];
        for (std::size_t r = 0; r < kQUAD; ++r) {
            row[r] = loadBytes<kFORMAT, kPARTIAL>(w + offsets[r], bytes);
        }
        addQuad<kFORMAT>(row, Dot::word(rows.words[quad]), dot);
    }
    finishQuads<kFORMAT>(dot);

    if (weights.zeroPoints == ZeroPoints::kINTEGERS) {
        Simd::I zeros[kVECTORS];
        zeroPoints<kFORMAT, kPARTIAL>(weights.zero + group * weights.rowBytes + at, bytes, zeros);
        const Simd::I factor = Simd::broadcastInt(total);
        for (int v = 0; v < kVECTORS; ++v) {
            dot[v] = Dot::subtractProduct(dot[v], zeros[v], factor);
        }
    }
    const BlockFactors factors(rows.scales[block], total);
    float* to = sums + step * stepColumns(kFORMAT);
    withTerms<S>(weights, [&](auto terms) __attribute__((always_inline)) {
        constexpr ZeroPoints kZEROS = decltype(terms)::kPOINTS;
        constexpr bool kSCALED = decltype(terms)::kHAS_SCALES;
        const Record<kFORMAT, S> record(weights, group, step);
        for (int v = 0; v < kVECTORS; ++v) {
            const std::size_t lane = static_cast<std::size_t>(v) * Simd::kLANES;
            const Simd::F scale = loadIf<kSCALED>(record.scales + lane);
            const Simd::F zero = loadIf<kZEROS != ZeroPoints::kNONE>(record.zeros + lane);
            Simd::store(to + lane, plusBlock<kZEROS, kSCALED>(Simd::load(to + lane), dot[v],
                                                              factors, scale, zero));
        }
    });
}

// Asks for kept rows a distance ahead of where they are multiplied, block after block.
template <Cache kCACHE>
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
        // If rows do not begin with a line, a part of one ends in a line of its own.
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
            askScales<kCACHE>(mDots.weights, mPlace.group, mPlace.step);
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
    RowsAhead<kCACHE> ahead(dots, steps);
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

}  // namespace
}  // namespace nmexport
