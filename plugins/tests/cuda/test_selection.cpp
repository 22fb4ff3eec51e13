// Selection logic on the CPU, exhaustively where that is possible: masks, ties, networks against
// ranks, work split.
#include "../ranking.h"
#include "selection.cuh"
#include "work_split.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

using namespace nmexport::cuda;

namespace {

int checks = 0;
int failures = 0;

void check(bool ok, char const* what) {
    ++checks;
    if (!ok) {
        ++failures;
        std::printf("FAILED %s\n", what);
    }
}

//! The slow and obvious rule: sort by descending score, NaN first, take n.
uint64_t keepBySort(std::vector<float> const& scores, int n) {
    std::vector<std::size_t> order(scores.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
        return nmexport::test::ranksBefore(scores[a], a, scores[b], b);
    });
    uint64_t mask = 0;
    for (int i = 0; i < n; ++i) {
        mask |= uint64_t{1} << order[i];
    }
    return mask;
}

uint64_t keepByRank(std::vector<uint32_t> const& keys, int n) {
    int const m = static_cast<int>(keys.size());
    uint64_t mask = 0;
    for (int i = 0; i < m; ++i) {
        mask |= rankInGroup(keys.data(), m, i) < n ? uint64_t{1} << i : 0;
    }
    return mask;
}

//! The wide lane-to-lane ranking, played through for the 8 lanes of one group.
uint64_t keepByWideLanes(uint32_t const* keys, int n) {
    uint64_t mask = 0;
    for (int lane = 0; lane < 8; ++lane) {
        WideRank rank(keys[2 * lane], keys[2 * lane + 1]);
        for (int step = 1; step < 8; ++step) {
            int const other = lane ^ step;
            rank.meet(keys[2 * other], keys[2 * other + 1], other < lane);
        }
        mask |= (rank.beforeLow < n ? 1U : 0U) << (2 * lane) | (rank.beforeHigh < n ? 1U : 0U)
                                                                   << (2 * lane + 1);
    }
    return mask;
}

//! The packed lane-to-lane ranking, played through for the 8 lanes of one group of bfloat16 bits.
uint64_t keepByPackedLanes(uint16_t const (&bits)[16], int n) {
    uint32_t keys[8];
    for (int lane = 0; lane < 8; ++lane) {
        keys[lane] =
            packedKeys(bits[2 * lane] | static_cast<uint32_t>(bits[2 * lane + 1]) << 16, 0x7f81U);
    }
    uint64_t mask = 0;
    for (int lane = 0; lane < 8; ++lane) {
        PackedRank rank(keys[lane]);
        for (int step = 1; step < 8; ++step) {
            rank.meet(keys[lane ^ step], (lane ^ step) < lane);
        }
        mask |= rank.keepsLow(n) ? uint64_t{1} << 2 * lane : 0;
        mask |= rank.keepsHigh(n) ? uint64_t{2} << 2 * lane : 0;
    }
    return mask;
}

template <int COUNT>
uint64_t keepByNetwork(std::vector<uint32_t> const& keys, int n) {
    uint32_t array[COUNT];
    std::copy_n(keys.begin(), COUNT, array);
    return keepMask<COUNT>(array, n);
}

template <int COUNT>
bool allAgree(std::vector<float> const& scores, int n) {
    std::vector<uint32_t> keys(COUNT);
    std::vector<uint32_t> signedKeys(COUNT);
    std::vector<float> magnitudes(COUNT);
    for (int i = 0; i < COUNT; ++i) {
        keys[i] = magnitudeKey(scores[i]);
        signedKeys[i] = orderedKey(scaledScore(scores[i], 1.0F));
        magnitudes[i] = std::fabs(scores[i]);
    }
    uint64_t const expected = keepBySort(magnitudes, n);
    return keepByRank(keys, n) == expected && keepByNetwork<COUNT>(keys, n) == expected &&
           keepByNetwork<COUNT>(signedKeys, n) == expected;
}

void testEveryMaskOfEightOfSixteen() {
    int masks = 0;
    bool ok = true;
    for (uint32_t mask = 0; mask < 65536U; ++mask) {
        if (__builtin_popcount(mask) != 8) {
            continue;
        }
        ++masks;
        std::vector<float> scores(16);
        std::vector<uint32_t> keys(16);
        for (int i = 0; i < 16; ++i) {
            float const size = (mask >> i & 1U) != 0U ? 10.0F + static_cast<float>(i * 7 % 16)
                                                      : static_cast<float>(i * 5 % 16) / 4.0F;
            scores[i] = i % 3 == 0 ? -size : size;
            keys[i] = magnitudeKey(scores[i]);
        }
        ok = ok && keepByNetwork<16>(keys, 8) == mask && keepByWideLanes(keys.data(), 8) == mask &&
             keepByRank(keys, 8) == mask;
    }
    check(ok && masks == 12870, "each of the 12870 masks of 8 of 16 is found");
}

//! The pattern of three score values whose digits in base 3 are `pattern`'s.
template <int COUNT>
struct TiePattern {
    uint32_t keys[COUNT];
    uint32_t places[3]{0, 0, 0};  //!< bit i of places[v]: element i has value v

    explicit TiePattern(long pattern) {
        for (int i = 0; i < COUNT; ++i, pattern /= 3) {
            keys[i] = magnitudeKey(static_cast<float>(pattern % 3));
            places[pattern % 3] |= 1U << i;
        }
    }
};

//! All of the larger values, then the first of the value at the border: by counting, not by
//! ranking.
uint32_t keepByCounting(uint32_t const (&places)[3], int n) {
    uint32_t mask = 0;
    for (int value = 2; value >= 0; --value) {
        uint32_t rest = places[value];
        if (__builtin_popcount(rest) <= n) {
            mask |= rest;
            n -= __builtin_popcount(rest);
            continue;
        }
        for (; n > 0; --n, rest &= rest - 1U) {
            mask |= rest & -rest;
        }
        break;
    }
    return mask;
}

//! Every pattern of three values over COUNT <= 8 elements.
template <int COUNT>
void testEveryTiePattern(int n) {
    long const patterns = std::lround(std::pow(3.0, COUNT));
    bool ok = true;
    for (long index = 0; index < patterns; ++index) {
        TiePattern<COUNT> const pattern(index);
        std::vector<uint32_t> const keys(pattern.keys, pattern.keys + COUNT);
        uint32_t const expected = keepByCounting(pattern.places, n);
        ok = ok && keepMask<COUNT>(pattern.keys, n) == expected;
    }
    check(ok, "tie patterns over three values");
}

//! The keys of a tie pattern as bfloat16 magnitudes, one element a half word.
void packPattern(uint32_t const (&keys)[16], uint16_t (&bits)[16]) {
    for (int i = 0; i < 16; ++i) {
        bits[i] = static_cast<uint16_t>((keys[i] - 1U) >> 16);
    }
}

//! Every pattern of three values over 16 elements, put together from two tables of halves: the
//! network of the mask pass on one group and on two at once (neighbouring patterns), and the packed
//! ranking of the decode kernel.
void testEveryTiePatternOfSixteen() {
    std::vector<TiePattern<8>> halves;
    for (long index = 0; index < 6561; ++index) {
        halves.emplace_back(index);
    }
    bool network = true;
    bool wide = true;
    bool pairs = true;
    bool packed = true;
    uint32_t keys[16];
    uint16_t bits[16];
    uint32_t pair[16] = {};
    uint32_t expectedBefore = 0xff;  // of 16 equal elements: the first 8
    for (TiePattern<8> const& high : halves) {
        std::copy_n(high.keys, 8, keys + 8);
        for (TiePattern<8> const& low : halves) {
            std::copy_n(low.keys, 8, keys);
            uint32_t const places[3] = {low.places[0] | high.places[0] << 8,
                                        low.places[1] | high.places[1] << 8,
                                        low.places[2] | high.places[2] << 8};
            uint32_t const expected = keepByCounting(places, 8);
            network = network && keepMask<16>(keys, 8) == expected;
            wide = wide && keepByWideLanes(keys, 8) == expected;
            packPattern(keys, bits);
            packed = packed && keepByPackedLanes(bits, 8) == expected;
            for (int i = 0; i < 16; ++i) {
                pair[i] = pair[i] >> 16 | static_cast<uint32_t>(bits[i]) << 16;
            }
            pairs = pairs && keepHalfOfPair(pair) == (expectedBefore | expected << 16);
            expectedBefore = expected;
        }
    }
    check(network, "all 3^16 tie patterns of 8 of 16, one group");
    check(wide, "all 3^16 tie patterns of 8 of 16, wide ranking");
    check(pairs, "all 3^16 tie patterns of 8 of 16, two groups at once");
    check(packed, "all 3^16 tie patterns of 8 of 16, packed ranking");
}

template <int COUNT>
void testRandomAndSpecial() {
    std::mt19937 random(7);
    std::normal_distribution<float> normal;
    float const specials[] = {0.0F,      -0.0F, 1e-45F, -1e-45F, INFINITY,
                              -INFINITY, NAN,   -NAN,   1.0F,    -1.0F};
    bool ok = true;
    for (int trial = 0; trial < 20000; ++trial) {
        std::vector<float> scores(COUNT);
        for (float& score : scores) {
            score = trial % 2 == 0 ? normal(random) : specials[random() % 10];
        }
        for (int n : {1, COUNT / 4, COUNT / 2, 3 * COUNT / 4, COUNT}) {
            ok = ok && (n < 1 || allAgree<COUNT>(scores, n));
        }
    }
    check(ok, "random and special values, networks and ranks against a sort");
}

//! The mask pass over two equal groups of bfloat16 bits; both halves must agree.
uint64_t keepByPair(uint16_t const (&bits)[16]) {
    uint32_t keys[16];
    for (int i = 0; i < 16; ++i) {
        keys[i] = packedKeys(bits[i] * 0x00010001U, 0x7f81U);
    }
    uint32_t const mask = keepHalfOfPair(keys);
    return mask >> 16 == (mask & 0xffffU) ? mask >> 16 : ~uint64_t{0};
}

void testPackedLanes() {
    std::mt19937 random(5);
    uint16_t const specials[] = {0x0000, 0x8000, 0x0001, 0x8001, 0x3f80, 0xbf80,
                                 0x7f80, 0xff80, 0x7f81, 0xffff, 0x7fff};
    bool ok = true;
    for (int trial = 0; trial < 200000; ++trial) {
        uint16_t bits[16];
        std::vector<float> magnitudes(16);
        for (int i = 0; i < 16; ++i) {
            uint32_t const draw = static_cast<uint32_t>(random());
            bits[i] = static_cast<uint16_t>(trial % 3 == 0   ? specials[draw % 11]
                                            : trial % 3 == 1 ? draw
                                                             : 0x3f80U + draw % 3);
            uint32_t const wide = static_cast<uint32_t>(bits[i]) << 16;
            std::memcpy(&magnitudes[i], &wide, sizeof(wide));
            magnitudes[i] = std::fabs(magnitudes[i]);
        }
        int const n = 1 + trial % 16;
        ok = ok && keepByPackedLanes(bits, n) == keepBySort(magnitudes, n);
        if (n == 8) {
            ok = ok && keepByPair(bits) == keepBySort(magnitudes, n);
        }
    }
    check(ok, "packed ranking of 16-bit floats against a sort");
}

void testAnyGroupSize() {
    std::mt19937 random(11);
    bool ok = true;
    for (int m = 1; m <= 64; ++m) {
        for (int trial = 0; trial < 50; ++trial) {
            std::vector<float> scores(m);
            std::vector<uint32_t> keys(m);
            for (int i = 0; i < m; ++i) {
                scores[i] = static_cast<float>(random() % 7) - 3.0F;  // negative scores too
                keys[i] = orderedKey(scores[i]);
            }
            int const n = 1 + static_cast<int>(random() % m);
            ok = ok && keepByRank(keys, n) == keepBySort(scores, n);
            ok = ok && (m != 16 || keepByWideLanes(keys.data(), n) == keepBySort(scores, n));
        }
    }
    check(ok, "group sizes 1 to 64, scores of both signs");
}

void testKeysOrderAsFloats() {
    std::mt19937 random(3);
    bool ok = true;
    for (int trial = 0; trial < 2000000; ++trial) {
        uint32_t const bits[2] = {static_cast<uint32_t>(random()), static_cast<uint32_t>(random())};
        float values[2];
        std::memcpy(values, bits, sizeof(values));
        bool const nan = std::isnan(values[0]) || std::isnan(values[1]);
        if (!nan) {
            ok = ok && (orderedKey(values[0]) > orderedKey(values[1])) == (values[0] > values[1]);
            ok = ok && (magnitudeKey(values[0]) > magnitudeKey(values[1])) ==
                           (std::fabs(values[0]) > std::fabs(values[1]));
        }
        ok = ok && orderedKey(values[0]) >= 1U && magnitudeKey(values[0]) >= 1U;
        ok = ok && orderedKey(NAN) >= orderedKey(values[0]) &&
             magnitudeKey(NAN) >= magnitudeKey(values[0]);
    }
    check(ok, "keys order as the floats do");
    check(orderedKey(-0.0F) == orderedKey(0.0F) && magnitudeKey(-0.0F) == magnitudeKey(0.0F),
          "-0 equals +0");
    check(orderedKey(INFINITY) < orderedKey(NAN) && magnitudeKey(INFINITY) < magnitudeKey(-NAN),
          "NaN above infinity");
}

void testSplitCoversEverything() {
    bool ok = true;
    for (int total : {0, 1, 3, 7, 128, 448, 896, 4097}) {
        for (int parts : {1, 2, 3, 5, 8, 40, 64, 128}) {
            int at = 0;
            for (int index = 0; index < parts; ++index) {
                Range const range = splitRange(total, parts, index);
                int const size = range.end - range.begin;
                ok = ok && range.begin == at && size >= total / parts && size <= total / parts + 1;
                at = range.end;
            }
            ok = ok && at == total;
        }
    }
    for (int m = 1; m <= 64; ++m) {
        int const width = chunkWidth(m);
        ok = ok && width % m == 0 && width <= 64 && (width <= 32 || width == m) && width + m > 32;
    }
    check(ok, "splits cover each unit once, chunks hold whole groups");
}

}  // namespace

int main() {
    testEveryMaskOfEightOfSixteen();
    testEveryTiePattern<4>(2);
    testEveryTiePattern<8>(4);
    testEveryTiePattern<8>(3);
    testEveryTiePatternOfSixteen();
    testRandomAndSpecial<4>();
    testRandomAndSpecial<8>();
    testRandomAndSpecial<16>();
    testRandomAndSpecial<32>();
    testPackedLanes();
    testAnyGroupSize();
    testKeysOrderAsFloats();
    testSplitCoversEverything();
    std::printf("%d passed, %d failed\n", checks - failures, failures);
    return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
