// Selection: which n of each m scores are kept. Included by each variant after its Simd.
//
// Lanes are groups: one vector holds position j of kLANES groups, so a sorting network over
// vectors sorts kLANES groups at once, without a branch. Only the n-th largest key is needed:
//
//   keys of a group   [ first half | second half ]     (padded to a power of two, least key)
//                          sort          sort           Batcher's odd-even merge sort, descending
//   n-th largest of both = max over i of min(first[i-1], second[n-i-1])
//
// Everything at or above it is kept. Where that is more than n (ties at the threshold), the group
// is settled one key at a time: the earlier of equal scores wins.

namespace nmexport {
namespace {

constexpr std::int32_t kLEAST_KEY = -0x7fffffff - 1;
constexpr std::int32_t kNAN_KEY = 0x7fffffff;

struct Comparator {
    int low;
    int high;
};

template <int kSIZE>
struct SortingNetwork {
    Comparator comparators[kSIZE < 2 ? 1 : kSIZE * 8] = {};  // 8 * 32 holds the largest network
    int count = 0;

    constexpr SortingNetwork() {
        for (int p = 1; p < kSIZE; p *= 2) {
            for (int k = p; k >= 1; k /= 2) {
                for (int j = k % p; j + k < kSIZE; j += 2 * k) {
                    for (int i = j; i < j + k && i + k < kSIZE; ++i) {
                        if (i / (2 * p) == (i + k) / (2 * p)) {
                            comparators[count] = {i, i + k};
                            ++count;
                        }
                    }
                }
            }
        }
    }
};

template <int kSIZE>
struct Sorter {
    static constexpr SortingNetwork<kSIZE> kNETWORK{};

    // Unrolled by the pack, so that the vectors live in registers.
    template <int... kINDEX>
    static inline __attribute__((always_inline)) void run(Simd::I* v,
                                                          std::integer_sequence<int, kINDEX...>) {
        (exchange(v[kNETWORK.comparators[kINDEX].low], v[kNETWORK.comparators[kINDEX].high]), ...);
    }
    static inline __attribute__((always_inline)) void sort(Simd::I* v) {
        run(v, std::make_integer_sequence<int, kNETWORK.count>());
    }

  private:
    static inline __attribute__((always_inline)) void exchange(Simd::I& low, Simd::I& high) {
        const Simd::I larger = Simd::max(low, high);
        high = Simd::min(low, high);
        low = larger;
    }
};

// A half of one key is sorted.
template <>
struct Sorter<1> {
    static inline void sort(Simd::I*) {}
};

// One group, one key at a time; keeps every key above the threshold, then the first equal ones.
std::uint64_t selectTied(const std::int32_t* keys, int n, int m, std::int32_t threshold) {
    int spare = n;
    for (int j = 0; j < m; ++j) spare -= keys[j] > threshold;
    std::uint64_t mask = 0;
    for (int j = 0; j < m; ++j) {
        const bool equal = keys[j] == threshold;
        const bool keep = keys[j] > threshold || (equal && spare > 0);
        spare -= equal;
        mask |= static_cast<std::uint64_t>(keep) << j;
    }
    return mask;
}

// kLANES groups of m <= kSIZE keys each.
template <int kSIZE>
void selectLanes(const std::int32_t* keys, int n, int m, std::uint64_t* masks) {
    constexpr int kHALF = kSIZE / 2;
    Simd::I original[kSIZE];
    Simd::loadGroups<kSIZE>(keys, m, original);
    for (int j = m; j < kSIZE; ++j) original[j] = Simd::broadcastInt(kLEAST_KEY);

    Simd::I sorted[kSIZE];
    for (int j = 0; j < kSIZE; ++j) sorted[j] = original[j];
    Sorter<kHALF>::sort(sorted);
    Sorter<kHALF>::sort(sorted + kHALF);

    Simd::I threshold = Simd::broadcastInt(kLEAST_KEY);
    for (int i = n > kHALF ? n - kHALF : 0; i <= (n < kHALF ? n : kHALF); ++i) {
        const Simd::I first = i > 0 ? sorted[i - 1] : Simd::broadcastInt(kNAN_KEY);
        const Simd::I second = n > i ? sorted[kHALF + n - i - 1] : Simd::broadcastInt(kNAN_KEY);
        threshold = Simd::max(threshold, Simd::min(first, second));
    }

    Simd::I count = Simd::broadcastInt(0);
    Simd::I low = count;   // keep bits 0..31
    Simd::I high = count;  // keep bits 32..63
    for (int j = 0; j < (m < 32 ? m : 32); ++j) {
        const std::int32_t bit = static_cast<std::int32_t>(1u << j);
        Simd::countAtLeast(original[j], threshold, bit, &count, &low);
    }
    if constexpr (kSIZE > 32) {
        for (int j = 32; j < m; ++j) {
            const std::int32_t bit = static_cast<std::int32_t>(1u << (j - 32));
            Simd::countAtLeast(original[j], threshold, bit, &count, &high);
        }
    }

    std::int32_t lowBits[Simd::kLANES], highBits[Simd::kLANES];
    Simd::storeInt(lowBits, low);
    Simd::storeInt(highBits, high);
    for (int g = 0; g < Simd::kLANES; ++g) {
        masks[g] = static_cast<std::uint32_t>(lowBits[g]) |
                   static_cast<std::uint64_t>(static_cast<std::uint32_t>(highBits[g])) << 32;
    }
    if (Simd::allEqual(count, n)) return;

    std::int32_t counts[Simd::kLANES], thresholds[Simd::kLANES];
    Simd::storeInt(counts, count);
    Simd::storeInt(thresholds, threshold);
    for (int g = 0; g < Simd::kLANES; ++g) {
        if (counts[g] != n) masks[g] = selectTied(keys + g * m, n, m, thresholds[g]);
    }
}

template <int kSIZE>
void selectAll(const std::int32_t* keys, std::size_t groups, int n, int m, std::uint64_t* masks) {
    constexpr std::size_t kLANES = Simd::kLANES;
    const std::size_t size = static_cast<std::size_t>(m);
    std::size_t g = 0;
    for (; g + kLANES <= groups; g += kLANES) selectLanes<kSIZE>(keys + g * size, n, m, masks + g);
    if (g == groups) return;

    // The last few groups, beside groups of nothing.
    std::int32_t lastKeys[kLANES * kSIZE] = {};
    std::uint64_t lastMasks[kLANES];
    std::memcpy(lastKeys, keys + g * size, (groups - g) * size * sizeof *keys);
    selectLanes<kSIZE>(lastKeys, n, m, lastMasks);
    std::memcpy(masks + g, lastMasks, (groups - g) * sizeof *masks);
}

void selectGroups(const std::int32_t* keys, std::size_t groups, int n, int m,
                  std::uint64_t* masks) {
    if (m <= 2) return selectAll<2>(keys, groups, n, m, masks);
    if (m <= 4) return selectAll<4>(keys, groups, n, m, masks);
    if (m <= 8) return selectAll<8>(keys, groups, n, m, masks);
    if (m <= 16) return selectAll<16>(keys, groups, n, m, masks);
    if (m <= 32) return selectAll<32>(keys, groups, n, m, masks);
    return selectAll<64>(keys, groups, n, m, masks);
}

// A float32 score as an integer of the same order: adding +0 turns -0 into +0, the bits below the
// sign are inverted for negative scores (a negative score_scale), and every NaN is the top key.
inline std::int32_t keyOf(float score) {
    const std::int32_t bits = static_cast<std::int32_t>(bitsOf(score + 0.0f));
    const std::int32_t ordered = bits ^ ((bits >> 31) & 0x7fffffff);
    return score != score ? kNAN_KEY : ordered;
}

void scoreKeys(const float* z, const float* scoreScale, std::size_t channels, std::int32_t* keys) {
    if (scoreScale == nullptr) {
        for (std::size_t p = 0; p < channels; ++p) keys[p] = keyOf(__builtin_fabsf(z[p]));
    } else {
        for (std::size_t p = 0; p < channels; ++p) {
            keys[p] = keyOf(__builtin_fabsf(z[p]) * scoreScale[p]);
        }
    }
}

// A template, so that a variant without the instruction does not have to name it.
template <typename Lanes>
std::size_t listKept(const KeptRows& kept) {
    std::size_t count = 0;
    if constexpr (Lanes::kCOMPRESSES) {
        for (std::size_t p = 0; p < kept.channels; p += Lanes::kLANES) {
            const std::uint32_t mask =
                static_cast<std::uint32_t>(kept.keep[p / 64] >> (p % 64) & 0xffff);
            Lanes::compress(kept.z + p, mask, kept.values + count);
            Lanes::compressIndex(static_cast<std::int32_t>(p), mask, kept.rows + count);
            count += static_cast<std::size_t>(__builtin_popcount(mask));
        }
        return count;
    }
    for (std::size_t first = 0; first < kept.channels; first += 64) {
        for (std::uint64_t bits = kept.keep[first / 64]; bits != 0; bits &= bits - 1) {
            const std::size_t p = first + static_cast<std::size_t>(__builtin_ctzll(bits));
            kept.rows[count] = static_cast<std::int32_t>(p);
            kept.values[count++] = kept.z[p];
        }
    }
    return count;
}

template <typename Lanes>
void cutKept(const KeptBlocks& kept) {
    // A vector is written whole, but the neighbour's room may be another thread's.
    alignas(64) float values[kBLOCK + Lanes::kLANES];
    for (std::size_t block = 0; block * kBLOCK < kept.channels; ++block) {
        const std::uint64_t keep = kept.keep[block];
        const float* z = kept.z + block * kBLOCK;
        kept.masks[block * kept.blockTokens] = keep;
        std::size_t count = 0;
        if constexpr (Lanes::kCOMPRESSES) {
            for (std::size_t i = 0; i < kBLOCK; i += Lanes::kLANES) {
                const std::uint32_t mask = static_cast<std::uint32_t>(keep >> i & 0xffff);
                Lanes::compress(z + i, mask, values + count);
                count += static_cast<std::size_t>(__builtin_popcount(mask));
            }
        } else {
            for (std::uint64_t bits = keep; bits != 0; bits &= bits - 1) {
                values[count++] = z[__builtin_ctzll(bits)];
            }
        }
        float* to = kept.values + block * kept.blockTokens * kept.stride;
        for (std::size_t i = 0; i < kept.stride; i += Lanes::kLANES) {
            Lanes::store(to + i, Lanes::load(values + i));
        }
    }
}

}  // namespace
}  // namespace nmexport
