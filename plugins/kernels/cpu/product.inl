// The product s @ W over kept rows only. Included by each variant after its Simd.
//
// Both forms below compute every output element as one chain of fused multiply-adds over the
// token's kept positions in ascending order, starting from zero, so a token's result has the same
// bits alone, in a batch, and however columns and tokens are split.

namespace nmexport {
namespace {

// Dense blocks: tokens and vectors of a tile whose sums, with a row's vectors, fit the registers.
constexpr std::size_t kTILE_TOKENS = 4;
constexpr int kTILE_VECTORS = Simd::kREGISTERS > 16 ? 4 : 2;
// Decode: rows multiplied per pass over the tile's sums. More rows let a short part of a row last
// until the next rows arrive; fewer keep the streams of a long part within what a core tracks ...
constexpr std::size_t kSHORT_PART_ROWS = 16;
constexpr std::size_t kLONG_PART_ROWS = 8;
constexpr std::size_t kSHORT_PART_BYTES = 4096;
// ... and cache lines asked for before their turn, over the rows of a pass: what one core's share
// of the bandwidth holds in flight, and to spare; of bytes more, because widening them fills the
// core's window with few lines. All are measured.
template <typename T>
constexpr std::size_t kLINES_AHEAD = sizeof(T) > 1 ? 160 : 320;
constexpr std::size_t kLINE_BYTES = 64;

template <typename T>
inline const T* rowOf(const T* w, std::size_t rowStride, std::int32_t row) {
    return w + static_cast<std::size_t>(row) * rowStride;
}

// What a stored weight stands for: itself (times a scale that waits for the end), itself times a
// scale of its group of rows, or the same less a zero point.
enum class Form { kPLAIN, kSCALED, kSHIFTED };

// The scales and zero points of a row, from the tile's first column on; null where it has none.
template <typename T>
struct RowScale {
    const float* scale = nullptr;
    const float* zero = nullptr;
};

template <typename T, Form kFORM>
inline Simd::F weight(const T* w, const RowScale<T>& row, std::size_t at) {
    if constexpr (kFORM == Form::kSHIFTED) {
        const Simd::F whole = Simd::sub(Simd::load(w + at), Simd::load(row.zero + at));
        return Simd::mul(whole, Simd::load(row.scale + at));
    } else if constexpr (kFORM == Form::kSCALED) {
        return Simd::mul(Simd::load(w + at), Simd::load(row.scale + at));
    } else {
        return Simd::load(w + at);
    }
}

template <typename T, Form kFORM>
inline Simd::F partialWeight(const T* w, const RowScale<T>& row, std::size_t at, int count) {
    Simd::F weight = Simd::loadPartial(w + at, count);
    if constexpr (kFORM == Form::kSHIFTED) {
        weight = Simd::sub(weight, Simd::loadPartial(row.zero + at, count));
    }
    if constexpr (kFORM != Form::kPLAIN) {
        weight = Simd::mul(weight, Simd::loadPartial(row.scale + at, count));
    }
    return weight;
}

template <typename T, Form kFORM>
inline RowScale<T> scaleOf(const WeightScales& scales, std::size_t rowStride, std::int32_t row) {
    if constexpr (kFORM == Form::kPLAIN) return {};
    const std::size_t at = static_cast<std::size_t>(row) / scales.channels * rowStride;
    RowScale<T> found;
    found.scale = scales.rows + at;
    if constexpr (kFORM == Form::kSHIFTED) found.zero = scales.zeros + at;
    return found;
}

// Some rows of W against the tile, and what to ask for meanwhile: the addresses depend on the
// token, so the hardware cannot guess the rows of the next pass.
//
//   row[r]   | multiplied ...      | asked for ... |
//   next[r]  | asked for, once the end of row[r] has been |
template <typename T, Form kFORM, Cache kCACHE, std::size_t kROWS>
class RowPass {
  public:
    RowPass(const RowProduct& p, std::size_t first) : mProduct(p) {
        const T* w = static_cast<const T*>(p.w);
        for (std::size_t r = 0; r < kROWS; ++r) {
            mRow[r] = rowOf(w, p.rowStride, p.rows[first + r]);
            mScale[r] = scaleOf<T, kFORM>(p.scales, p.rowStride, p.rows[first + r]);
            mValue[r] = Simd::broadcast(p.values[first + r]);
            // Past the end the last row is asked for again, which costs nothing.
            const std::size_t ahead = first + kROWS + r;
            mNext[r] = rowOf(w, p.rowStride, p.rows[ahead < p.count ? ahead : p.count - 1]);
        }
    }

    // Nothing has been asked for yet.
    void prefetchStart() const {
        for (std::size_t j = 0; j < kAHEAD && j < mProduct.columns; j += kLINE_BYTES / sizeof(T)) {
            for (std::size_t r = 0; r < kROWS; ++r) ask(mRow[r] + j);
        }
    }

    void add() const {
        const std::size_t whole = mProduct.columns / kSTEP * kSTEP;
        const std::size_t turn = whole > kAHEAD ? whole - kAHEAD : 0;
        addSpan(0, turn, mRow, kAHEAD);
        addSpan(turn, whole, mNext, std::size_t{0} - turn);
        for (std::size_t j = whole; j < mProduct.columns; j += Simd::kLANES) addTail(j, turn);
    }

  private:
    // Vectors of one cache line of W, as far as registers allow: a line is asked for once.
    static constexpr std::size_t kLINE = kLINE_BYTES / (sizeof(T) * Simd::kLANES);
    static constexpr std::size_t kVECTORS = kLINE < 1 ? 1 : (kLINE > 4 ? 4 : kLINE);
    static constexpr std::size_t kSTEP = kVECTORS * Simd::kLANES;
    static constexpr std::size_t kAHEAD = kLINES_AHEAD<T> / kROWS * (kLINE_BYTES / sizeof(T));
    static_assert(kAHEAD % kSTEP == 0, "the spans of a pass are whole steps");

    static inline __attribute__((always_inline)) void ask(const T* address) {
        if constexpr (kCACHE == Cache::kFIRST_LEVEL) {
            Simd::prefetch(address);
        } else {
            Simd::prefetchFar(address);
        }
    }

    // Columns begin .. end - 1; `offset` is from a column to the one to ask for in `ahead`.
    inline __attribute__((always_inline)) void addSpan(std::size_t begin, std::size_t end,
                                                       const T* const* ahead,
                                                       std::size_t offset) const {
        for (std::size_t j = begin; j < end; j += kSTEP) {
            float* to = mProduct.sums + j;
            Simd::F sum[kVECTORS];
            for (std::size_t v = 0; v < kVECTORS; ++v) sum[v] = Simd::load(to + v * Simd::kLANES);
            // Unrolled, so that addresses and values stay in registers.
#pragma GCC unroll 16
            for (std::size_t r = 0; r < kROWS; ++r) {
                ask(ahead[r] + (j + offset));
                for (std::size_t v = 0; v < kVECTORS; ++v) {
                    const std::size_t at = j + v * Simd::kLANES;
                    sum[v] = Simd::fma(mValue[r], weight<T, kFORM>(mRow[r], mScale[r], at), sum[v]);
                }
            }
            for (std::size_t v = 0; v < kVECTORS; ++v) Simd::store(to + v * Simd::kLANES, sum[v]);
        }
    }

    void addTail(std::size_t j, std::size_t turn) const {
        constexpr std::size_t kLANES = Simd::kLANES;
        const std::size_t left = mProduct.columns - j;
        const int count = static_cast<int>(left < kLANES ? left : kLANES);
        Simd::F sum = Simd::loadPartial(mProduct.sums + j, count);
        for (std::size_t r = 0; r < kROWS; ++r) {
            ask(mNext[r] + (j - turn));
            const Simd::F w = partialWeight<T, kFORM>(mRow[r], mScale[r], j, count);
            sum = Simd::fma(mValue[r], w, sum);
        }
        Simd::storePartial(mProduct.sums + j, sum, count);
    }

    const RowProduct& mProduct;
    const T* mRow[kROWS];
    const T* mNext[kROWS];
    RowScale<T> mScale[kROWS];
    Simd::F mValue[kROWS];
};

// Passes of kROWS rows from `first` on, as many as there are; the row after them.
template <typename T, Form kFORM, Cache kCACHE, std::size_t kROWS>
inline std::size_t addRows(const RowProduct& p, std::size_t first) {
    for (; first + kROWS <= p.end; first += kROWS) {
        const RowPass<T, kFORM, kCACHE, kROWS> pass(p, first);
        if (first == 0) pass.prefetchStart();
        pass.add();
    }
    return first;
}

template <typename T, Form kFORM, Cache kCACHE>
void addAllRows(const RowProduct& p) {
    std::size_t done = p.begin;
    // Widening bytes takes the registers that so many rows would need.
    constexpr bool kROOM = Simd::kREGISTERS > kSHORT_PART_ROWS || sizeof(T) > 1;
    if (kROOM && p.columns * sizeof(T) <= kSHORT_PART_BYTES) {
        done = addRows<T, kFORM, kCACHE, kSHORT_PART_ROWS>(p, done);
    }
    done = addRows<T, kFORM, kCACHE, kLONG_PART_ROWS>(p, done);
    addRows<T, kFORM, kCACHE, 1>(p, done);
}

// Some of one token's rows: W is read from memory, the tile's sums stay in the first-level cache.
template <typename T, Form kFORM>
void rowProduct(const RowProduct& p) {
    if (p.begin == 0) std::memset(p.sums, 0, p.columns * sizeof *p.sums);
    if (p.ahead == Cache::kFIRST_LEVEL) {
        addAllRows<T, kFORM, Cache::kFIRST_LEVEL>(p);
    } else {
        addAllRows<T, kFORM, Cache::kSECOND_LEVEL>(p);
    }
}

// From a token's sums to the next one's.
constexpr std::size_t kSUM_STRIDE = kPANEL_VECTORS * Simd::kLANES;

// Rows `first ..` of the panel that any token keeps, as float32, contiguous and padded with zeros.
template <typename T, Form kFORM>
void packBlock(const PanelProduct& p, std::size_t first, std::uint64_t wanted, std::size_t width) {
    const T* w = static_cast<const T*>(p.w);
    const std::size_t whole = p.columns / Simd::kLANES * Simd::kLANES;
    const int left = static_cast<int>(p.columns - whole);
    for (; wanted != 0; wanted &= wanted - 1) {
        const std::size_t i = static_cast<std::size_t>(__builtin_ctzll(wanted));
        const std::int32_t position = static_cast<std::int32_t>(first + i);
        const T* row = rowOf(w, p.rowStride, position);
        const RowScale<T> scale = scaleOf<T, kFORM>(p.scales, p.rowStride, position);
        float* to = p.packed + i * width;
        for (std::size_t j = 0; j < whole; j += Simd::kLANES) {
            Simd::store(to + j, weight<T, kFORM>(row, scale, j));
        }
        if (left != 0) {
            Simd::store(to + whole, partialWeight<T, kFORM>(row, scale, whole, left));
        }
    }
}

// Asks for the panel's part of rows of the next block, which lie a whole row of W apart, a few
// lines at a time: asked for all at once they would hold up the loads of the block being
// multiplied. They go to the second-level cache: the first is full of that block.
template <typename T>
class BlockPrefetcher {
  public:
    BlockPrefetcher(const PanelProduct& p, std::size_t block, std::uint64_t wanted,
                    std::size_t turns)
        : mProduct(p), mFirst((block + 1) * kBLOCK), mWanted(wanted) {
        const std::size_t rows = static_cast<std::size_t>(__builtin_popcountll(wanted));
        const std::size_t lines = (p.columns + kLINE - 1) / kLINE;
        mLines = (rows * lines + turns - 1) / turns;
    }

    // Called once a turn.
    void next() {
        for (std::size_t line = 0; mWanted != 0 && line < mLines; ++line) {
            const std::size_t i = static_cast<std::size_t>(__builtin_ctzll(mWanted));
            const T* w = static_cast<const T*>(mProduct.w);
            const T* row = w + (mFirst + i) * mProduct.rowStride;
            Simd::prefetchFar(row + mColumn);
            mColumn += kLINE;
            if (mColumn >= mProduct.columns) {
                mColumn = 0;
                mWanted &= mWanted - 1;
            }
        }
    }

  private:
    static constexpr std::size_t kLINE = kLINE_BYTES / sizeof(T);

    const PanelProduct& mProduct;
    std::size_t mFirst;
    std::uint64_t mWanted;
    std::size_t mLines;       // a turn
    std::size_t mColumn = 0;  // of the first row that is wanted
};

// The channels of a block that the tokens keep, a bit for each.
struct BlockKeep {
    std::uint64_t any;  // token keeps it: the rows to pack
    std::uint64_t all;  // tokens keep it
};

BlockKeep keepOfBlock(const PanelProduct& p, std::size_t block) {
    BlockKeep keep{0, ~std::uint64_t{0}};
    const std::uint64_t* masks = p.keep + block * p.blockTokens;
    for (std::size_t t = 0; t < p.tokens; ++t) {
        keep.any |= masks[t];
        keep.all &= masks[t];
    }
    return keep;
}

std::size_t channelsOfBlock(const PanelProduct& p, std::size_t block) {
    const std::size_t left = p.channels - block * kBLOCK;
    return left < kBLOCK ? left : kBLOCK;
}

// True if every token keeps every channel of a block.
bool isWhole(const PanelProduct& p, std::size_t block, const BlockKeep& keep) {
    return keep.all == ~std::uint64_t{0} >> (kBLOCK - channelsOfBlock(p, block));
}

// A packed row. The address is computed on its own: folded into each multiply-add as base and index
// it would take Intel cores an instruction more every time.
template <int kVECTORS>
inline __attribute__((always_inline)) const float* packedRow(const float* packed,
                                                             std::uint64_t keep) {
    constexpr std::size_t kWIDTH = static_cast<std::size_t>(kVECTORS) * Simd::kLANES;
    const float* row = packed + static_cast<std::size_t>(__builtin_ctzll(keep)) * kWIDTH;
    __asm__("" : "+r"(row));
    return row;
}

// One token's kept rows of one packed block, from a mask of those still to add and their values.
template <int kVECTORS>
inline __attribute__((always_inline)) void addKept(const float* packed, const float* values,
                                                   std::uint64_t keep, Simd::F* sum) {
    for (; keep != 0; keep &= keep - 1) {
        const Simd::F value = Simd::broadcast(*values++);
        const float* row = packedRow<kVECTORS>(packed, keep);
        for (int v = 0; v < kVECTORS; ++v) {
            sum[v] = Simd::fma(value, Simd::load(row + v * Simd::kLANES), sum[v]);
        }
    }
}

template <int kVECTORS>
inline void clearSums(float* sums) {
    for (int v = 0; v < kVECTORS; ++v) Simd::store(sums + v * Simd::kLANES, Simd::broadcast(0.0f));
}

template <int kVECTORS>
inline void loadSums(const float* sums, Simd::F* sum) {
    for (int v = 0; v < kVECTORS; ++v) sum[v] = Simd::load(sums + v * Simd::kLANES);
}

template <int kVECTORS>
inline void storeSums(float* sums, const Simd::F* sum) {
    for (int v = 0; v < kVECTORS; ++v) Simd::store(sums + v * Simd::kLANES, sum[v]);
}

// Two tokens side by side, where there are registers for both: twice the independent chains, so
// one token's start and end hide behind the other. Each keeps its own order.
template <int kVECTORS>
inline __attribute__((always_inline)) void multiplyPair(const float* packed, const float* valuesA,
                                                        const float* valuesB, std::uint64_t keepA,
                                                        std::uint64_t keepB, float* sumsA,
                                                        float* sumsB) {
    Simd::F a[kVECTORS], b[kVECTORS];
    loadSums<kVECTORS>(sumsA, a);
    loadSums<kVECTORS>(sumsB, b);
    for (; keepA != 0 && keepB != 0; keepA &= keepA - 1, keepB &= keepB - 1) {
        const Simd::F valueA = Simd::broadcast(*valuesA++);
        const Simd::F valueB = Simd::broadcast(*valuesB++);
        const float* rowA = packedRow<kVECTORS>(packed, keepA);
        const float* rowB = packedRow<kVECTORS>(packed, keepB);
        for (int v = 0; v < kVECTORS; ++v) {
            a[v] = Simd::fma(valueA, Simd::load(rowA + v * Simd::kLANES), a[v]);
            b[v] = Simd::fma(valueB, Simd::load(rowB + v * Simd::kLANES), b[v]);
        }
    }
    // Groups that straddle blocks can leave one token a few more kept rows than the other.
    addKept<kVECTORS>(packed, valuesA, keepA, a);
    addKept<kVECTORS>(packed, valuesB, keepB, b);
    storeSums<kVECTORS>(sumsA, a);
    storeSums<kVECTORS>(sumsB, b);
}

// Some tokens of a panel, from one block to the next: their sums begin at zero and end as results.
class PanelTokens {
  public:
    PanelTokens(const PanelProduct& p, std::size_t block)
        : mProduct(p),
          mIsFirst(block == 0),
          mIsLast((block + 1) * kBLOCK >= p.channels),
          mKept(p.kept + block * p.blockTokens * p.keptStride),
          mKeep(p.keep + block * p.blockTokens) {}

    const float* kept(std::size_t token) const { return mKept + token * mProduct.keptStride; }
    std::uint64_t keep(std::size_t token) const { return mKeep[token]; }
    float* sums(std::size_t token) const { return mProduct.sums + token * kSUM_STRIDE; }

    // What comes from the second-level cache and the hardware does not guess, and the lines that
    // results go to.
    inline __attribute__((always_inline)) void prefetch(std::size_t token) const {
        if (token >= mProduct.tokens) return;
        const float* values = kept(token);
        for (std::size_t i = 0; i < mProduct.keptStride; i += kLINE_BYTES / sizeof *values) {
            Simd::prefetch(values + i);
        }
        if (!mIsLast) return;
        const char* y = static_cast<const char*>(mProduct.epilogue.y) + token * mProduct.yStride;
        for (std::size_t at = 0; at < mProduct.yBytes; at += kLINE_BYTES) {
            Simd::prefetchWrite(y + at);
        }
    }

    template <int kVECTORS>
    void begin(std::size_t first, std::size_t count) const {
        if (!mIsFirst) return;
        for (std::size_t t = first; t < first + count; ++t) clearSums<kVECTORS>(sums(t));
    }

    void end(std::size_t first, std::size_t count) const {
        if (!mIsLast) return;
        Epilogue epilogue = mProduct.epilogue;
        for (std::size_t t = first; t < first + count; ++t) {
            epilogue.sums = sums(t);
            epilogue.factors = mProduct.factors[t];
            epilogue.y = static_cast<char*>(mProduct.epilogue.y) + t * mProduct.yStride;
            mProduct.finish(epilogue);
        }
    }

  private:
    const PanelProduct& mProduct;
    bool mIsFirst;
    bool mIsLast;
    const float* mKept;
    const std::uint64_t* mKeep;
};

// Each token's kept rows of one packed block; its sums stay in registers meanwhile.
template <typename T, int kVECTORS>
void multiplyBlock(const PanelProduct& p, std::size_t block, std::uint64_t wantedNext) {
    BlockPrefetcher<T> prefetcher(p, block, wantedNext, (p.tokens + 1) / 2);
    const PanelTokens tokens(p, block);
    std::size_t t = 0;
    if constexpr (Simd::kREGISTERS > 2 * kPANEL_VECTORS) {
        for (; t + 2 <= p.tokens; t += 2) {
            prefetcher.next();
            tokens.prefetch(t + 2);
            tokens.prefetch(t + 3);
            tokens.begin<kVECTORS>(t, 2);
            multiplyPair<kVECTORS>(p.packed, tokens.kept(t), tokens.kept(t + 1), tokens.keep(t),
                                   tokens.keep(t + 1), tokens.sums(t), tokens.sums(t + 1));
            tokens.end(t, 2);
        }
    }
    for (; t < p.tokens; ++t) {
        prefetcher.next();
        tokens.prefetch(t + 1);
        tokens.begin<kVECTORS>(t, 1);
        Simd::F sum[kVECTORS];
        loadSums<kVECTORS>(tokens.sums(t), sum);
        addKept<kVECTORS>(p.packed, tokens.kept(t), tokens.keep(t), sum);
        storeSums<kVECTORS>(tokens.sums(t), sum);
        tokens.end(t, 1);
    }
}

// A dense tile: several tokens share each vector of W that is loaded. Per sum the same chain as
// above, so the same bits.
template <std::size_t kTOKENS, int kVECTORS>
inline void multiplyTileOfAll(const float* packed, std::size_t width, std::size_t rows,
                              const float* z, std::size_t zStride, float* sums) {
    Simd::F sum[kTOKENS][kVECTORS];
    for (std::size_t t = 0; t < kTOKENS; ++t) loadSums<kVECTORS>(sums + t * kSUM_STRIDE, sum[t]);
    for (std::size_t i = 0; i < rows; ++i, packed += width) {
        Simd::F w[kVECTORS];
        for (int v = 0; v < kVECTORS; ++v) w[v] = Simd::load(packed + v * Simd::kLANES);
        for (std::size_t t = 0; t < kTOKENS; ++t) {
            const Simd::F value = Simd::broadcast(z[t * zStride + i]);
            for (int v = 0; v < kVECTORS; ++v) sum[t][v] = Simd::fma(value, w[v], sum[t][v]);
        }
    }
    for (std::size_t t = 0; t < kTOKENS; ++t) storeSums<kVECTORS>(sums + t * kSUM_STRIDE, sum[t]);
}

// Tiles of some tokens across the panel.
template <std::size_t kTOKENS, int kVECTORS>
inline void multiplyAcross(const float* packed, std::size_t rows, const float* z,
                           std::size_t zStride, float* sums) {
    constexpr std::size_t kWIDTH = static_cast<std::size_t>(kVECTORS) * Simd::kLANES;
    constexpr int kREST = kVECTORS % kTILE_VECTORS;
    for (int v = 0; v + kTILE_VECTORS <= kVECTORS; v += kTILE_VECTORS) {
        const std::size_t at = static_cast<std::size_t>(v) * Simd::kLANES;
        multiplyTileOfAll<kTOKENS, kTILE_VECTORS>(packed + at, kWIDTH, rows, z, zStride, sums + at);
    }
    if constexpr (kREST != 0) {
        constexpr std::size_t kAT = static_cast<std::size_t>(kVECTORS - kREST) * Simd::kLANES;
        multiplyTileOfAll<kTOKENS, kREST>(packed + kAT, kWIDTH, rows, z, zStride, sums + kAT);
    }
}

// A block of which every token keeps everything: a dense product, as in prompts where only decode
// is sparse, or where N is M.
template <typename T, int kVECTORS>
void multiplyWholeBlock(const PanelProduct& p, std::size_t block, std::uint64_t wantedNext) {
    const std::size_t turns = (p.tokens + kTILE_TOKENS - 1) / kTILE_TOKENS;
    BlockPrefetcher<T> prefetcher(p, block, wantedNext, turns);
    const PanelTokens tokens(p, block);
    const std::size_t rows = channelsOfBlock(p, block);
    std::size_t t = 0;
    for (; t + kTILE_TOKENS <= p.tokens; t += kTILE_TOKENS) {
        prefetcher.next();
        tokens.begin<kVECTORS>(t, kTILE_TOKENS);
        multiplyAcross<kTILE_TOKENS, kVECTORS>(p.packed, rows, tokens.kept(t), p.keptStride,
                                               tokens.sums(t));
        tokens.end(t, kTILE_TOKENS);
    }
    for (; t < p.tokens; ++t) {
        prefetcher.next();
        tokens.begin<kVECTORS>(t, 1);
        multiplyAcross<1, kVECTORS>(p.packed, rows, tokens.kept(t), p.keptStride, tokens.sums(t));
        tokens.end(t, 1);
    }
}

template <typename T, Form kFORM, int kVECTORS>
void panelProductOf(const PanelProduct& p) {
    constexpr std::size_t kWIDTH = static_cast<std::size_t>(kVECTORS) * Simd::kLANES;
    const std::size_t blocks = (p.channels + kBLOCK - 1) / kBLOCK;
    BlockKeep keep = keepOfBlock(p, 0);
    for (std::size_t block = 0; block < blocks; ++block) {
        const BlockKeep next = block + 1 < blocks ? keepOfBlock(p, block + 1) : BlockKeep{0, 0};
        packBlock<T, kFORM>(p, block * kBLOCK, keep.any, kWIDTH);
        if (isWhole(p, block, keep)) {
            multiplyWholeBlock<T, kVECTORS>(p, block, next.any);
        } else {
            multiplyBlock<T, kVECTORS>(p, block, next.any);
        }
        keep = next;
    }
}

template <typename T, Form kFORM>
void panelProduct(const PanelProduct& p) {
    switch ((p.columns + Simd::kLANES - 1) / Simd::kLANES) {
        case 1:
            return panelProductOf<T, kFORM, 1>(p);
        case 2:
            return panelProductOf<T, kFORM, 2>(p);
        case 3:
            return panelProductOf<T, kFORM, 3>(p);
        case 4:
            return panelProductOf<T, kFORM, 4>(p);
        case 5:
            return panelProductOf<T, kFORM, 5>(p);
        case 6:
            return panelProductOf<T, kFORM, 6>(p);
        case 7:
            return panelProductOf<T, kFORM, 7>(p);
        default:
            return panelProductOf<T, kFORM, 8>(p);
    }
}

}  // namespace
}  // namespace nmexport
