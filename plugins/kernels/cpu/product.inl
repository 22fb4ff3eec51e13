// The product s @ W over kept rows only. Included by each variant after its Simd.
//
// Both forms below compute every output element as one chain of fused multiply-adds over the
// token's kept positions in ascending order, starting from zero, so a token's result has the same
// bits alone, in a batch, and however columns and tokens are split.

namespace nmexport {
namespace {

// Rows multiplied per pass over the tile's sums: one load and one store of a sum per 8 loads of W.
constexpr std::size_t kROWS_PER_PASS = 8;
// Up to this many tokens share too few rows for packing to pay (measured).
constexpr std::size_t kIN_PLACE_TOKENS = 4;

template <typename T>
inline const T* rowOf(const T* w, std::size_t rowStride, std::int32_t row) {
    return w + static_cast<std::size_t>(row) * rowStride;
}

template <typename T, std::size_t kROWS>
inline void addRows(const RowProduct& p, std::size_t first) {
    constexpr std::size_t kLANES = Simd::kLANES;
    const T* w = static_cast<const T*>(p.w);
    const T* row[kROWS];
    const T* next[kROWS];
    Simd::F value[kROWS];
    for (std::size_t r = 0; r < kROWS; ++r) {
        row[r] = rowOf(w, p.rowStride, p.rows[first + r]);
        value[r] = Simd::broadcast(p.values[first + r]);
        // The addresses depend on the token, so the hardware cannot guess the rows of the next
        // pass; past the end, the last row is asked for again, which costs nothing.
        const std::size_t ahead = first + kROWS + r;
        next[r] = rowOf(w, p.rowStride, p.rows[ahead < p.count ? ahead : p.count - 1]);
    }
    std::size_t j = 0;
    for (; j + kLANES <= p.columns; j += kLANES) {
        Simd::F sum = Simd::load(p.sums + j);
        for (std::size_t r = 0; r < kROWS; ++r) {
            Simd::prefetch(next[r] + j);
            sum = Simd::fma(value[r], Simd::load(row[r] + j), sum);
        }
        Simd::store(p.sums + j, sum);
    }
    if (j == p.columns) return;
    const int left = static_cast<int>(p.columns - j);
    Simd::F sum = Simd::loadPartial(p.sums + j, left);
    for (std::size_t r = 0; r < kROWS; ++r) {
        Simd::prefetch(next[r] + j);
        sum = Simd::fma(value[r], Simd::loadPartial(row[r] + j, left), sum);
    }
    Simd::storePartial(p.sums + j, sum, left);
}

// One token: W is read from memory, the tile's sums stay in the first-level cache.
template <typename T>
void rowProduct(const RowProduct& p) {
    std::memset(p.sums, 0, p.columns * sizeof *p.sums);
    std::size_t i = 0;
    for (; i + kROWS_PER_PASS <= p.count; i += kROWS_PER_PASS) addRows<T, kROWS_PER_PASS>(p, i);
    for (; i < p.count; ++i) addRows<T, 1>(p, i);
}

// Row of W that a position of the operand meets.
inline std::int32_t rowAt(const PanelProduct& p, std::size_t position) {
    return p.channelOrder == nullptr ? static_cast<std::int32_t>(position)
                                     : p.channelOrder[position];
}

// Rows `first ..` of the panel that any token keeps, as float32, contiguous and padded with zeros.
template <typename T>
void packBlock(const PanelProduct& p, std::size_t first, std::uint64_t wanted, std::size_t width) {
    const T* w = static_cast<const T*>(p.w);
    const std::size_t whole = p.columns / Simd::kLANES * Simd::kLANES;
    const int left = static_cast<int>(p.columns - whole);
    for (; wanted != 0; wanted &= wanted - 1) {
        const std::size_t i = static_cast<std::size_t>(__builtin_ctzll(wanted));
        const std::size_t position = first + i;
        const T* row = rowOf(w, p.rowStride, rowAt(p, position));
        float* to = p.packed + i * width;
        for (std::size_t j = 0; j < whole; j += Simd::kLANES) {
            Simd::store(to + j, Simd::load(row + j));
        }
        if (left != 0) Simd::store(to + whole, Simd::loadPartial(row + whole, left));
    }
}

// Asks for the panel's part of the block's rows, which lie a whole row of W apart.
template <typename T>
void prefetchBlock(const PanelProduct& p, std::size_t first, std::uint64_t wanted) {
    constexpr std::size_t kLINE = 64 / sizeof(T);
    const T* w = static_cast<const T*>(p.w);
    for (; wanted != 0; wanted &= wanted - 1) {
        const std::size_t position = first + static_cast<std::size_t>(__builtin_ctzll(wanted));
        const T* row = rowOf(w, p.rowStride, rowAt(p, position));
        for (std::size_t j = 0; j < p.columns; j += kLINE) Simd::prefetchFar(row + j);
    }
}

std::uint64_t wantedBlock(const PanelProduct& p, std::size_t block) {
    std::uint64_t wanted = 0;
    for (std::size_t t = 0; t < p.tokens; ++t) wanted |= p.keep[t * p.keepStride + block];
    return wanted;
}

// One token's kept rows of one packed block, from a mask of those still to add.
template <int kVECTORS>
inline void addKept(const float* packed, const float* z, std::uint64_t keep, Simd::F* sum) {
    constexpr std::size_t kWIDTH = static_cast<std::size_t>(kVECTORS) * Simd::kLANES;
    for (; keep != 0; keep &= keep - 1) {
        const std::size_t i = static_cast<std::size_t>(__builtin_ctzll(keep));
        const Simd::F value = Simd::broadcast(z[i]);
        const float* row = packed + i * kWIDTH;
        for (int v = 0; v < kVECTORS; ++v) {
            sum[v] = Simd::fma(value, Simd::load(row + v * Simd::kLANES), sum[v]);
        }
    }
}

// What comes from the second-level cache for one token: its operands, a row of z apart, its sums.
template <int kVECTORS>
inline void prefetchToken(const float* z, const float* sums) {
    for (std::size_t i = 0; i < kBLOCK; i += 16) Simd::prefetch(z + i);
    for (int v = 0; v < kVECTORS; ++v) Simd::prefetch(sums + v * Simd::kLANES);
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
inline void multiplyPair(const float* packed, const float* zA, const float* zB, std::uint64_t keepA,
                         std::uint64_t keepB, float* sumsA, float* sumsB) {
    constexpr std::size_t kWIDTH = static_cast<std::size_t>(kVECTORS) * Simd::kLANES;
    Simd::F a[kVECTORS], b[kVECTORS];
    loadSums<kVECTORS>(sumsA, a);
    loadSums<kVECTORS>(sumsB, b);
    for (; keepA != 0 && keepB != 0; keepA &= keepA - 1, keepB &= keepB - 1) {
        const std::size_t i = static_cast<std::size_t>(__builtin_ctzll(keepA));
        const std::size_t j = static_cast<std::size_t>(__builtin_ctzll(keepB));
        const Simd::F valueA = Simd::broadcast(zA[i]);
        const Simd::F valueB = Simd::broadcast(zB[j]);
        const float* rowA = packed + i * kWIDTH;
        const float* rowB = packed + j * kWIDTH;
        for (int v = 0; v < kVECTORS; ++v) {
            a[v] = Simd::fma(valueA, Simd::load(rowA + v * Simd::kLANES), a[v]);
            b[v] = Simd::fma(valueB, Simd::load(rowB + v * Simd::kLANES), b[v]);
        }
    }
    // Groups that straddle blocks can leave one token a few more kept rows than the other.
    addKept<kVECTORS>(packed, zA, keepA, a);
    addKept<kVECTORS>(packed, zB, keepB, b);
    storeSums<kVECTORS>(sumsA, a);
    storeSums<kVECTORS>(sumsB, b);
}

// Each token's kept rows of one packed block; its sums stay in registers meanwhile.
template <int kVECTORS>
void multiplyBlock(const PanelProduct& p, std::size_t block, std::size_t sumStride) {
    const float* z = p.z + block * kBLOCK;
    const std::uint64_t* keep = p.keep + block;
    float* sums = p.sums;
    std::size_t t = 0;
    if constexpr (Simd::kREGISTERS > 2 * kPANEL_VECTORS) {
        for (; t + 2 <= p.tokens; t += 2) {
            prefetchToken<kVECTORS>(z + 2 * p.zStride, sums + 2 * sumStride);
            prefetchToken<kVECTORS>(z + 3 * p.zStride, sums + 3 * sumStride);
            multiplyPair<kVECTORS>(p.packed, z, z + p.zStride, keep[0], keep[p.keepStride], sums,
                                   sums + sumStride);
            z += 2 * p.zStride;
            keep += 2 * p.keepStride;
            sums += 2 * sumStride;
        }
    }
    for (; t < p.tokens; ++t) {
        prefetchToken<kVECTORS>(z + p.zStride, sums + sumStride);
        Simd::F sum[kVECTORS];
        loadSums<kVECTORS>(sums, sum);
        addKept<kVECTORS>(p.packed, z, *keep, sum);
        storeSums<kVECTORS>(sums, sum);
        z += p.zStride;
        keep += p.keepStride;
        sums += sumStride;
    }
}

// Few tokens: packing would cost more than it saves, so rows are taken from W where they lie.
template <typename T, int kVECTORS, bool kWHOLE>
void multiplyInPlace(const PanelProduct& p, std::size_t block, std::size_t sumStride) {
    constexpr std::size_t kLANES = Simd::kLANES;
    const T* w = static_cast<const T*>(p.w);
    const std::size_t first = block * kBLOCK;
    const int left = static_cast<int>(p.columns - (kVECTORS - 1) * kLANES);
    for (std::size_t t = 0; t < p.tokens; ++t) {
        const float* z = p.z + t * p.zStride + first;
        Simd::F sum[kVECTORS];
        loadSums<kVECTORS>(p.sums + t * sumStride, sum);
        for (std::uint64_t keep = p.keep[t * p.keepStride + block]; keep != 0; keep &= keep - 1) {
            const std::size_t i = static_cast<std::size_t>(__builtin_ctzll(keep));
            const T* row = rowOf(w, p.rowStride, rowAt(p, first + i));
            const Simd::F value = Simd::broadcast(z[i]);
            for (int v = 0; v + (kWHOLE ? 0 : 1) < kVECTORS; ++v) {
                sum[v] = Simd::fma(value, Simd::load(row + v * Simd::kLANES), sum[v]);
            }
            if constexpr (!kWHOLE) {
                constexpr int kLAST = kVECTORS - 1;
                const Simd::F tail = Simd::loadPartial(row + kLAST * Simd::kLANES, left);
                sum[kLAST] = Simd::fma(value, tail, sum[kLAST]);
            }
        }
        storeSums<kVECTORS>(p.sums + t * sumStride, sum);
    }
}

template <typename T, int kVECTORS>
void panelProductOf(const PanelProduct& p) {
    constexpr std::size_t kWIDTH = static_cast<std::size_t>(kVECTORS) * Simd::kLANES;
    constexpr std::size_t kSUM_STRIDE = kPANEL_VECTORS * Simd::kLANES;
    std::memset(p.sums, 0, p.tokens * kSUM_STRIDE * sizeof *p.sums);
    const std::size_t blocks = (p.channels + kBLOCK - 1) / kBLOCK;
    const bool inPlace = p.tokens <= kIN_PLACE_TOKENS;
    std::uint64_t wanted = wantedBlock(p, 0);
    for (std::size_t block = 0; block < blocks; ++block) {
        if (!inPlace) packBlock<T>(p, block * kBLOCK, wanted, kWIDTH);
        if (block + 1 < blocks) {
            wanted = wantedBlock(p, block + 1);
            prefetchBlock<T>(p, (block + 1) * kBLOCK, wanted);
        }
        if (!inPlace) {
            multiplyBlock<kVECTORS>(p, block, kSUM_STRIDE);
        } else if (p.columns == kWIDTH) {
            multiplyInPlace<T, kVECTORS, true>(p, block, kSUM_STRIDE);
        } else {
            multiplyInPlace<T, kVECTORS, false>(p, block, kSUM_STRIDE);
        }
    }
}

template <typename T>
void panelProduct(const PanelProduct& p) {
    switch ((p.columns + Simd::kLANES - 1) / Simd::kLANES) {
        case 1:
            return panelProductOf<T, 1>(p);
        case 2:
            return panelProductOf<T, 2>(p);
        case 3:
            return panelProductOf<T, 3>(p);
        case 4:
            return panelProductOf<T, 4>(p);
        case 5:
            return panelProductOf<T, 5>(p);
        case 6:
            return panelProductOf<T, 6>(p);
        case 7:
            return panelProductOf<T, 7>(p);
        default:
            return panelProductOf<T, 8>(p);
    }
}

}  // namespace
}  // namespace nmexport
