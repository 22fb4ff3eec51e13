// A few tokens, each over the rows that it keeps. Included after dot_steps.inl.

namespace nmexport {
namespace {

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
        dot[v] = Simd::broadcastInt(startOf<kFORMAT>(weights.zeroPoints, total));
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

    if (weights.zeroPoints == ZeroPoints::kINTEGERS) {
        Simd::I zeros[kVECTORS];
        const std::uint8_t* from = static_cast<const std::uint8_t*>(weights.zero);
        zeroPoints<kFORMAT, kPARTIAL>(from + group * weights.zeroBytes + at, bytes, zeros);
        const Simd::I factor = Simd::broadcastInt(total);
        for (int v = 0; v < kVECTORS; ++v) {
            dot[v] = Dot::subtractProduct(dot[v], zeros[v], factor);
        }
    }
    const BlockFactors factors(rows.scales[block], total);
    const std::size_t column = step * stepColumns(kFORMAT);
    const std::size_t columns = kPARTIAL ? weights.columns - column : stepColumns(kFORMAT);
    float* to = sums + column;
    withTerms(weights, [&](auto terms) __attribute__((always_inline)) {
        constexpr ZeroPoints kZEROS = decltype(terms)::kPOINTS;
        constexpr bool kSCALED = decltype(terms)::kHAS_SCALES;
        Simd::F scales[kVECTORS] = {}, zeros[kVECTORS] = {};
        if constexpr (kSCALED) {
            const S* from = static_cast<const S*>(weights.scale) + group * weights.scaleStride;
            scalesOf<kFORMAT>(from + column, columns, scales);
        }
        if constexpr (kZEROS != ZeroPoints::kNONE) {
            floatZeros<kFORMAT, kZEROS>(weights, group, column, columns, zeros);
        }
        for (int v = 0; v < kVECTORS; ++v) {
            float* sum = to + v * Simd::kLANES;
            Simd::store(sum, plusBlock<kZEROS, kSCALED>(Simd::load(sum), dot[v], factors, scales[v],
                                                        zeros[v]));
        }
    });
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

}  // namespace
}  // namespace nmexport
