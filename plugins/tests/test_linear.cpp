// NMLinear and NMPrune over raw pointers: right against float64, and the same bits however the
// work is cut: by variant, thread, batch, neighbour or chunk.
#include "linear_case.h"
#include "nm_prune.h"

using namespace nmexport;
using namespace nmexport::test;

namespace {

void linearCases() {
    std::vector<Case> cases;
    for (std::size_t tokens : {1, 2, 3, 5, 6, 7, 17, 150}) {
        for (std::size_t outputs : {1, 3, 17, 130, 576}) {
            cases.push_back({tokens, 192, outputs, {8, 16}});
        }
    }
    for (Pattern pattern :
         {Pattern{2, 4}, Pattern{16, 32}, Pattern{1, 4}, Pattern{3, 8}, Pattern{12, 16},
          Pattern{16, 16}, Pattern{5, 24}, Pattern{1, 1}, Pattern{40, 64}, Pattern{7, 48}}) {
        for (std::size_t tokens : {4, 9}) {
            Case c{tokens, 192, 33, pattern};
            cases.push_back(c);
            c.order = c.scale = c.bias = true;
            cases.push_back(c);
        }
    }
    for (ElementType type :
         {ElementType::kFLOAT32, ElementType::kFLOAT16, ElementType::kBFLOAT16}) {
        for (unsigned flags = 0; flags < 256; ++flags) {
            constexpr std::size_t kTOKENS[] = {1, 6, 7};  // alone, few, many
            Case c{kTOKENS[flags % 3], 96, 50, {8, 16}};
            c.type = type;
            c.order = flags & 1;
            c.scale = flags & 2;
            c.bias = flags & 4;
            c.shift = flags & 8;
            c.perChannelShift = flags & 16;
            c.dynamic = (flags & 32) && !c.shift;
            c.variance = flags & 64;
            c.keepAll = flags & 128;
            c.valueScale = flags % 3 == 1;
            cases.push_back(c);
        }
    }
    for (ElementType type :
         {ElementType::kFLOAT32, ElementType::kFLOAT16, ElementType::kBFLOAT16}) {
        for (std::size_t groups : {1, 2, 4, 6, 12}) {
            for (std::size_t tokens : {1, 2, 5, 7, 70}) {
                for (unsigned flags = 0; flags < 4; ++flags) {
                    Case c{tokens, 192, 150, {8, 16}};
                    c.type = type;
                    c.weights = WeightType::kINT8;
                    c.scaleGroups = groups;
                    if ((flags ^ tokens) & 1) c.zeroPoints = ZeroPoints::kFLOATS;
                    c.order = flags & 1;
                    c.variance = c.bias = c.dynamic = c.valueScale = flags & 2;
                    cases.push_back(c);
                }
            }
        }
    }
    // Dense blocks, whole and cut off, beside rests of tokens and of columns.
    for (std::size_t tokens : {5, 8, 10, 71}) {
        for (std::size_t outputs : {5, 17, 50, 100, 130, 576}) {
            for (std::size_t channels : {32, 208}) {
                Case c{tokens, channels, outputs, {16, 16}};
                cases.push_back(c);
                c.order = true;
                c.weights = WeightType::kINT8;
                c.scaleGroups = channels / 16;
                cases.push_back(c);
            }
        }
    }
    // Parts of a row longer than what is asked for ahead, and passes of fewer rows.
    for (std::size_t outputs : {400, 1030, 2600}) {
        for (Pattern pattern : {Pattern{8, 16}, Pattern{5, 24}, Pattern{13, 16}}) {
            for (std::size_t tokens : {1, 3}) {
                Case c{tokens, 240, outputs, pattern};
                c.order = true;
                cases.push_back(c);
                c.weights = WeightType::kINT8;
                c.scaleGroups = 5;
                cases.push_back(c);
            }
        }
    }
    cases.push_back({1, 1536, 1000, {8, 16}});
    cases.push_back({9, 1536, 1000, {8, 16}});
    cases.push_back({1, 64, 9000, {8, 16}});  // more columns than a tile holds
    cases.push_back({5, 64, 9000, {8, 16}});
    unsigned seed = 100;
    for (const Case& c : cases) {
        const Data d = makeData(c, ++seed);
        const Bytes y = run(c, d, kSERIAL, 0, c.tokens);
        isRight(c, d, y);
        isTheSameEverywhere(c, d, y);
    }
}

void pruneKeepsValuesAndPlaces() {
    std::mt19937 random(8);
    constexpr std::size_t kTOKENS = 19, kCHANNELS = 144;
    const std::vector<float> x = normals(random, kTOKENS * kCHANNELS);
    std::vector<std::int32_t> order(kCHANNELS);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), random);
    std::vector<float> scale = normals(random, kCHANNELS);  // by position
    for (float& value : scale) value = std::fabs(value) + 0.1f;
    for (const Variant* variant : variants()) {
        useVariant(variant->name);
        std::vector<float> y(x.size(), -7.0f);
        nmPrune({ElementType::kFLOAT32,
                 x.data(),
                 y.data(),
                 kTOKENS,
                 kCHANNELS,
                 {8, 16},
                 scale.data(),
                 order.data()},
                kTHREADED);
        for (std::size_t t = 0; t < kTOKENS; ++t) {
            for (std::size_t g = 0; g < kCHANNELS; g += 16) {
                int kept = 0;
                float least = 1e30f, greatestDropped = 0.0f;
                for (std::size_t j = 0; j < 16; ++j) {
                    const std::size_t i = t * kCHANNELS + static_cast<std::size_t>(order[g + j]);
                    const float score = std::fabs(x[i]) * scale[g + j];
                    if (y[i] != 0.0f) {
                        EXPECT(y[i] == x[i]);
                        least = std::min(least, score);
                        ++kept;
                    } else {
                        greatestDropped = std::max(greatestDropped, score);
                    }
                }
                EXPECT(kept == 8);
                EXPECT(least >= greatestDropped);
            }
        }
    }
}

void noTokens() {
    const Case c{0, 32, 8, {8, 16}};
    const Data d = makeData({1, 32, 8, {8, 16}}, 9);
    EXPECT(run(c, d, kSERIAL, 0, 0).empty());
}

}  // namespace

int main() {
    linearCases();
    pruneKeepsValuesAndPlaces();
    noTokens();
    return report("linear");
}
