// Selection logic on the CPU, exhaustively where that is possible: masks, ties, networks against ranks, work split.
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

namespace
{

int failures = 0;

void check(bool ok, char const* what)
{
    if (!ok)
    {
        ++failures;
        std::printf("FAILED %s\n", what);
    }
}

//! The slow and obvious rule: stable sort by descending score, NaN first, take n.
uint64_t keepByStableSort(std::vector<float> const& scores, int n)
{
    std::vector<int> order(scores.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
        bool const nanA = std::isnan(scores[a]);
        bool const nanB = std::isnan(scores[b]);
        return nanA != nanB ? nanA : (!nanA && scores[a] > scores[b]);
    });
    uint64_t mask = 0;
    for (int i = 0; i < n; ++i)
    {
        mask |= uint64_t{1} << order[i];
    }
    return mask;
}

uint64_t keepByRank(std::vector<uint32_t> const& keys, int n)
{
    int const m = static_cast<int>(keys.size());
    uint64_t mask = 0;
    for (int i = 0; i < m; ++i)
    {
        mask |= rankInGroup(keys.data(), m, i) < n ? uint64_t{1} << i : 0;
    }
    return mask;
}

template <int COUNT>
uint64_t keepByQuads(std::vector<uint32_t> const& keys, int n)
{
    uint64_t mask = 0;
    auto const loadQuad = [&](int quad, uint32_t(&out)[4]) { std::copy_n(keys.begin() + 4 * quad, 4, out); };
    for (int i = 0; i < COUNT; ++i)
    {
        mask |= rankByQuads<COUNT>(keys[i], i, loadQuad) < n ? uint64_t{1} << i : 0;
    }
    return mask;
}

template <int COUNT>
uint64_t keepByNetwork(std::vector<uint32_t> const& keys, int n)
{
    uint32_t array[COUNT];
    std::copy_n(keys.begin(), COUNT, array);
    return keepMask<COUNT>(array, n);
}

template <int COUNT>
bool allAgree(std::vector<float> const& scores, int n)
{
    std::vector<uint32_t> keys(COUNT);
    std::vector<uint32_t> signedKeys(COUNT);
    std::vector<float> magnitudes(COUNT);
    for (int i = 0; i < COUNT; ++i)
    {
        keys[i] = magnitudeKey(scores[i]);
        signedKeys[i] = orderedKey(scaledScore(scores[i], 1.0F));
        magnitudes[i] = std::fabs(scores[i]);
    }
    uint64_t const expected = keepByStableSort(magnitudes, n);
    return keepByRank(keys, n) == expected && keepByQuads<COUNT>(keys, n) == expected
        && keepByNetwork<COUNT>(keys, n) == expected && keepByNetwork<COUNT>(signedKeys, n) == expected;
}

void testEveryMaskOfEightOfSixteen()
{
    int masks = 0;
    bool ok = true;
    for (uint32_t mask = 0; mask < 65536U; ++mask)
    {
        if (__builtin_popcount(mask) != 8)
        {
            continue;
        }
        ++masks;
        std::vector<float> scores(16);
        std::vector<uint32_t> keys(16);
        for (int i = 0; i < 16; ++i)
        {
            float const size = (mask >> i & 1U) != 0U ? 10.0F + static_cast<float>(i * 7 % 16) : static_cast<float>(i * 5 % 16) / 4.0F;
            scores[i] = i % 3 == 0 ? -size : size;
            keys[i] = magnitudeKey(scores[i]);
        }
        ok = ok && keepByNetwork<16>(keys, 8) == mask && keepByQuads<16>(keys, 8) == mask && keepByRank(keys, 8) == mask;
    }
    check(ok && masks == 12870, "each of the 12870 masks of 8 of 16 is found");
}

//! All patterns of three score values over m elements, in base 3.
template <int COUNT>
void testEveryTiePattern(int n, long stride)
{
    long patterns = 1;
    for (int i = 0; i < COUNT; ++i)
    {
        patterns *= 3;
    }
    bool ok = true;
    std::vector<uint32_t> keys(COUNT);
    std::vector<int> digits(COUNT);
    for (long pattern = 0; pattern < patterns && ok; pattern += stride)
    {
        long rest = pattern;
        int counts[3] = {0, 0, 0};
        for (int i = 0; i < COUNT; ++i, rest /= 3)
        {
            digits[i] = static_cast<int>(rest % 3);
            keys[i] = magnitudeKey(static_cast<float>(digits[i]));
            ++counts[digits[i]];
        }
        uint64_t expected = 0; // counting: all of the larger values, then the first of the value at the border
        int left = n;
        for (int value = 2; value >= 0; --value)
        {
            for (int i = 0; i < COUNT; ++i)
            {
                if (digits[i] == value && left > 0)
                {
                    expected |= uint64_t{1} << i;
                    --left;
                }
            }
        }
        ok = keepByNetwork<COUNT>(keys, n) == expected && keepByQuads<COUNT>(keys, n) == expected;
    }
    check(ok, "tie patterns over three values");
}

template <int COUNT>
void testRandomAndSpecial()
{
    std::mt19937 random(7);
    std::normal_distribution<float> normal;
    float const specials[] = {0.0F, -0.0F, 1e-45F, -1e-45F, INFINITY, -INFINITY, NAN, -NAN, 1.0F, -1.0F};
    bool ok = true;
    for (int trial = 0; trial < 20000; ++trial)
    {
        std::vector<float> scores(COUNT);
        for (float& score : scores)
        {
            score = trial % 2 == 0 ? normal(random) : specials[random() % 10];
        }
        for (int n : {1, COUNT / 4, COUNT / 2, 3 * COUNT / 4, COUNT})
        {
            ok = ok && (n < 1 || allAgree<COUNT>(scores, n));
        }
    }
    check(ok, "random and special values, networks and ranks against a stable sort");
}

void testAnyGroupSize()
{
    std::mt19937 random(11);
    bool ok = true;
    for (int m = 1; m <= 64; ++m)
    {
        for (int trial = 0; trial < 50; ++trial)
        {
            std::vector<float> scores(m);
            std::vector<uint32_t> keys(m);
            for (int i = 0; i < m; ++i)
            {
                scores[i] = static_cast<float>(random() % 7) - 3.0F; // negative scores too
                keys[i] = orderedKey(scores[i]);
            }
            int const n = 1 + static_cast<int>(random() % m);
            ok = ok && keepByRank(keys, n) == keepByStableSort(scores, n);
        }
    }
    check(ok, "group sizes 1 to 64, scores of both signs");
}

void testKeysOrderAsFloats()
{
    std::mt19937 random(3);
    bool ok = true;
    for (int trial = 0; trial < 2000000; ++trial)
    {
        uint32_t const bits[2] = {static_cast<uint32_t>(random()), static_cast<uint32_t>(random())};
        float values[2];
        std::memcpy(values, bits, sizeof(values));
        bool const nan = std::isnan(values[0]) || std::isnan(values[1]);
        if (!nan)
        {
            ok = ok && (orderedKey(values[0]) > orderedKey(values[1])) == (values[0] > values[1]);
            ok = ok && (magnitudeKey(values[0]) > magnitudeKey(values[1])) == (std::fabs(values[0]) > std::fabs(values[1]));
        }
        ok = ok && orderedKey(values[0]) >= 1U && magnitudeKey(values[0]) >= 1U;
        ok = ok && orderedKey(NAN) >= orderedKey(values[0]) && magnitudeKey(NAN) >= magnitudeKey(values[0]);
    }
    check(ok, "keys order as the floats do");
    check(orderedKey(-0.0F) == orderedKey(0.0F) && magnitudeKey(-0.0F) == magnitudeKey(0.0F), "-0 equals +0");
    check(orderedKey(INFINITY) < orderedKey(NAN) && magnitudeKey(INFINITY) < magnitudeKey(-NAN), "NaN above infinity");
}

void testSplitCoversEverything()
{
    bool ok = true;
    for (int total : {0, 1, 3, 7, 128, 448, 896, 4097})
    {
        for (int parts : {1, 2, 3, 5, 8, 40, 64, 128})
        {
            int at = 0;
            for (int index = 0; index < parts; ++index)
            {
                Range const range = splitRange(total, parts, index);
                int const size = range.end - range.begin;
                ok = ok && range.begin == at && size >= total / parts && size <= total / parts + 1;
                at = range.end;
            }
            ok = ok && at == total;
        }
    }
    for (int m = 1; m <= 64; ++m)
    {
        int const width = chunkWidth(m);
        ok = ok && width % m == 0 && width <= 64 && (width <= 32 || width == m) && width + m > 32;
    }
    check(ok, "splits cover each unit once, chunks hold whole groups");
}

} // namespace

int main()
{
    testEveryMaskOfEightOfSixteen();
    testEveryTiePattern<4>(2, 1);
    testEveryTiePattern<8>(4, 1);
    testEveryTiePattern<8>(3, 1);
    testEveryTiePattern<16>(8, 1);
    testEveryTiePattern<32>(16, 1853020188851L / 50021);
    testRandomAndSpecial<4>();
    testRandomAndSpecial<8>();
    testRandomAndSpecial<16>();
    testRandomAndSpecial<32>();
    testAnyGroupSize();
    testKeysOrderAsFloats();
    testSplitCoversEverything();
    std::printf("%d passed, %d failed\n", 14 - std::min(failures, 14), failures);
    return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
