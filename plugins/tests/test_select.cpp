// Selection against a slow statement of the contract: the scores of each group, sorted.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "check.h"
#include "ranking.h"
#include "selection.h"

using namespace nmexport;
using namespace nmexport::test;

namespace {

std::uint64_t expectedMask(const float* scores, int n, int m) {
    std::vector<std::size_t> order(static_cast<std::size_t>(m));
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
        return ranksBefore(scores[a], a, scores[b], b);
    });
    std::uint64_t mask = 0;
    for (int i = 0; i < n; ++i) mask |= std::uint64_t{1} << order[static_cast<std::size_t>(i)];
    return mask;
}

// z of any number of groups through every variant; scale, by position, may be empty.
void compare(const std::vector<float>& z, const std::vector<float>& scale, int n, int m) {
    const std::size_t groups = z.size() / static_cast<std::size_t>(m);
    std::vector<float> scores(z.size());
    for (std::size_t p = 0; p < z.size(); ++p) {
        scores[p] = std::fabs(z[p]);
        if (!scale.empty()) scores[p] *= scale[p];
    }
    std::vector<std::int32_t> keys(z.size());
    std::vector<std::uint64_t> masks(groups), expected(groups);
    for (std::size_t g = 0; g < groups; ++g) {
        expected[g] = expectedMask(scores.data() + g * static_cast<std::size_t>(m), n, m);
    }
    for (const Variant* variant : variants()) {
        variant->scoreKeys(z.data(), scale.empty() ? nullptr : scale.data(), z.size(), keys.data());
        variant->selectGroups(keys.data(), groups, n, m, masks.data());
        EXPECT(sameBits(masks, expected));
    }
}

void everyPattern() {
    std::mt19937 random(3);
    for (int m = 1; m <= 64; ++m) {
        for (int n = 1; n <= m; n += m > 16 ? 5 : 1) {
            compare(normals(random, static_cast<std::size_t>(m) * 37), {}, n, m);
            std::vector<float> ties(static_cast<std::size_t>(m) * 35);
            for (float& value : ties) value = static_cast<float>(random() % 3) - 1.0f;
            compare(ties, {}, n, m);
        }
    }
}

// All 3^8 groups of {0, 1, 2}; of 3^16, a sample.
void exhaustiveTies() {
    std::vector<float> all;
    for (int code = 0; code < 6561; ++code) {
        for (int j = 0, rest = code; j < 8; ++j, rest /= 3) {
            all.push_back(static_cast<float>(rest % 3));
        }
    }
    for (int n = 1; n <= 8; ++n) compare(all, {}, n, 8);
    std::mt19937 random(4);
    std::vector<float> sample(16 * 20000);
    for (float& value : sample) value = static_cast<float>(random() % 3);
    for (int n : {1, 4, 8, 12, 15, 16}) compare(sample, {}, n, 16);
}

void extremes() {
    constexpr float kINF = std::numeric_limits<float>::infinity();
    constexpr float kNAN = std::numeric_limits<float>::quiet_NaN();
    const float special[] = {0.0f,
                             -0.0f,
                             1e-45f,
                             -1e-45f,
                             1e-38f,
                             kINF,
                             -kINF,
                             kNAN,
                             -kNAN,
                             1.0f,
                             -1.0f,
                             3e38f,
                             -3e38f,
                             floatOf(0x7f800001u),
                             floatOf(0xffffffffu),
                             floatOf(0x00800000u)};
    std::mt19937 random(5);
    std::vector<float> z(16 * 5000), scale(z.size());
    for (float& value : z) value = special[random() % 16];
    const float scales[] = {1.0f, 0.0f, -1.0f, kINF, 0.5f, kNAN, 1e-45f, 1e38f};
    for (float& value : scale) value = scales[random() % 8];
    for (int n : {1, 8, 15}) {
        compare(z, {}, n, 16);
        compare(z, scale, n, 16);
    }
}

// Of two elements one ranks first, whatever their scores: what all references sort by.
void rankingIsTotal() {
    const float scores[] = {1.0f,
                            floatOf(0x7f800001u),
                            0.0f,
                            1.0f,
                            -0.0f,
                            -1.0f,
                            floatOf(0xffffffffu),
                            std::numeric_limits<float>::infinity()};
    const std::size_t count = sizeof(scores) / sizeof(scores[0]);
    for (std::size_t a = 0; a < count; ++a) {
        EXPECT(!ranksBefore(scores[a], a, scores[a], a));
        for (std::size_t b = a + 1; b < count; ++b) {
            const bool first = ranksBefore(scores[a], a, scores[b], b);
            EXPECT(first != ranksBefore(scores[b], b, scores[a], a));
            const bool alike = std::isnan(scores[a]) && std::isnan(scores[b]);
            if (alike || scores[a] == scores[b]) EXPECT(first);
            if (std::isnan(scores[a]) != std::isnan(scores[b]))
                EXPECT(first == std::isnan(scores[a]));
        }
    }
}

void scoresAreScaled() {
    std::mt19937 random(6);
    std::vector<float> scale = normals(random, 960);
    for (float& value : scale) value = std::fabs(value);
    compare(normals(random, scale.size()), scale, 8, 16);
    compare(normals(random, scale.size()), scale, 3, 24);
}

// The list says what the bits say, whatever the number of channels.
void keptIsListed() {
    std::mt19937 random(8);
    for (const Variant* variant : variants()) {
        for (std::size_t channels : {1, 16, 24, 63, 64, 72, 200, 576}) {
            const std::vector<float> z = normals(random, channels);
            std::vector<std::uint64_t> keep(keepWords(channels));
            for (std::size_t p = 0; p < channels; ++p) {
                keep[p / 64] |= std::uint64_t{random() % 2} << (p % 64);
            }
            std::vector<std::int32_t> rows(channels + variant->lanes);
            std::vector<float> values(channels + variant->lanes);
            const std::size_t count =
                variant->listKept({z.data(), keep.data(), channels, rows.data(), values.data()});
            std::size_t expected = 0;
            for (std::size_t p = 0; p < channels; ++p) {
                if ((keep[p / 64] >> (p % 64) & 1) == 0) continue;
                EXPECT(rows[expected] == static_cast<std::int32_t>(p));
                EXPECT(values[expected] == z[p]);
                ++expected;
            }
            EXPECT(count == expected);
        }
    }
}

}  // namespace

int main() {
    everyPattern();
    exhaustiveTies();
    rankingIsTotal();
    extremes();
    scoresAreScaled();
    keptIsListed();
    return report("select");
}
