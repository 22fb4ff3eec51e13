// NMLinear with values in 8 bits: right against float64, and the same bits from every instruction
// set, thread count and split of the batch.
#include <limits>

#include "linear_case.h"

using namespace nmexport;
using namespace nmexport::test;

namespace {

constexpr WeightType kINTEGERS[] = {WeightType::kINT8, WeightType::kINT4, WeightType::kUINT4};

Case integerCase(std::size_t tokens, std::size_t channels, std::size_t outputs, Pattern pattern,
                 WeightType weights, std::size_t groups, std::size_t block) {
    Case c{tokens, channels, outputs, pattern};
    c.weights = weights;
    c.scaleGroups = groups;
    c.activationBlock = block;
    return c;
}

// With scales of any type and number.
constexpr ZeroPoints kEXACT[] = {ZeroPoints::kINTEGERS, ZeroPoints::kFLOATS, ZeroPoints::kNONE};

void addPatterns(std::vector<Case>& cases) {
    for (WeightType weights : kINTEGERS) {
        for (Pattern pattern : {Pattern{8, 16}, Pattern{2, 4}, Pattern{12, 16}, Pattern{16, 16},
                                Pattern{1, 4}, Pattern{3, 8}, Pattern{5, 24}, Pattern{16, 32}}) {
            for (std::size_t tokens : {1, 2, 5}) {
                cases.push_back(integerCase(tokens, 192, 70, pattern, weights, 1, 32));
                cases.push_back(integerCase(tokens, 192, 70, pattern, weights, 6, 16));
            }
        }
    }
}

// Every number of tokens that a tile is cut for, and rests of columns of every kind of step.
void addSizes(std::vector<Case>& cases) {
    unsigned turn = 0;
    for (std::size_t tokens = 1; tokens <= 40; ++tokens) {
        for (WeightType weights : kINTEGERS) {
            Case c = integerCase(tokens, 64, 34, {8, 16}, weights, turn % 2 + 1, 32);
            if (turn % 3 != 0) c.zeroPoints = kEXACT[turn / 3 % 2];
            cases.push_back(c);
            ++turn;
        }
    }
    for (std::size_t outputs : {2, 16, 30, 32, 64, 66, 126, 128, 130, 192, 258, 576}) {
        for (std::size_t tokens : {1, 3, 4, 7}) {
            for (WeightType weights : kINTEGERS) {
                cases.push_back(integerCase(tokens, 128, outputs, {8, 16}, weights, 4, 32));
            }
        }
    }
    for (std::size_t outputs : {1, 7, 33, 65}) {
        for (std::size_t tokens : {1, 6}) {
            cases.push_back(integerCase(tokens, 128, outputs, {8, 16}, WeightType::kINT8, 4, 32));
        }
    }
    for (std::size_t tokens : {1, 4, 120}) {
        cases.push_back(integerCase(tokens, 96, 1300, {8, 16}, WeightType::kINT8, 1, 96));
        cases.push_back(integerCase(tokens, 96, 1300, {8, 16}, WeightType::kUINT4, 3, 16));
    }
    cases.push_back(integerCase(1, 64, 9000, {8, 16}, WeightType::kINT8, 1, 32));
    cases.push_back(integerCase(1, 1536, 576, {8, 16}, WeightType::kINT8, 1, 32));
    cases.push_back(integerCase(2, 1536, 576, {8, 16}, WeightType::kINT4, 12, 128));
}

void addScalesAndCorrections(std::vector<Case>& cases) {
    constexpr ElementType kTYPES[] = {ElementType::kFLOAT32, ElementType::kFLOAT16,
                                      ElementType::kBFLOAT16};
    constexpr std::size_t kTOKENS[] = {1, 2, 9};
    for (unsigned flags = 0; flags < 192; ++flags) {
        const std::size_t groups = flags % 4 == 0 ? 1 : std::size_t{1} << flags % 4;
        Case c = integerCase(kTOKENS[flags % 3], 256, 50, {8, 16}, kINTEGERS[flags / 3 % 3], groups,
                             flags % 5 == 0 ? 16 : 32);
        c.type = kTYPES[flags / 2 % 3];
        c.halves = groups > 1 && (flags & 1);
        c.zeroPoints = kEXACT[flags % 3];
        c.order = flags & 2;
        c.scale = flags & 4;
        c.bias = flags & 8;
        c.shift = flags & 16;
        c.perChannelShift = flags & 32;
        c.dynamic = (flags & 32) && !c.shift;
        c.variance = flags & 64;
        c.keepAll = flags % 7 == 3;
        c.valueScale = flags & 128;
        cases.push_back(c);
    }
    for (unsigned turn = 0; turn < 72; ++turn) {
        const std::size_t groups = std::size_t{2} << turn % 4;
        const std::size_t tokens = turn / 4 % 3 == 0 ? 1 : turn / 4 % 7 + 1;
        Case c = integerCase(tokens, 512, 2 + 46 * (turn % 5), {8, 16}, kINTEGERS[turn % 3], groups,
                             turn % 2 == 0 ? 32 : 16);
        c.type = kTYPES[turn % 3];
        c.halves = true;
        c.zeroPoints = ZeroPoints::kFLOATS;
        c.order = turn & 1;
        c.bias = turn & 2;
        c.keepAll = turn % 5 == 3;
        cases.push_back(c);
    }
    // An integer sum that comes close to what 16 bits, and then 24, can hold.
    cases.push_back(integerCase(5, 4096, 34, {16, 16}, WeightType::kINT8, 1, 4096));
}

void integerCases() {
    std::vector<Case> cases;
    addPatterns(cases);
    addSizes(cases);
    addScalesAndCorrections(cases);
    unsigned seed = 500;
    for (const Case& c : cases) {
        const Data d = makeData(c, ++seed);
        const Bytes y = run(c, d, kSERIAL, 0, c.tokens);
        isRight(c, d, y);
        isTheSameEverywhere(c, d, y);
    }
}

// Values halfway between two integers go to the even one. The largest is 127, so that the values
// are the integers themselves; the weights are the identity.
void tiesGoToEven() {
    constexpr std::size_t kSIZE = 16;
    Case c = integerCase(1, kSIZE, kSIZE, {16, 16}, WeightType::kINT8, 1, kSIZE);
    Data d = makeData(c, 7);
    d.x = {127,    0.5f,    1.5f, 2.5f,  -0.5f, -1.5f, -2.5f, 3.5f,
           126.5f, -126.5f, 0,    63.5f, 64.5f, 1,     2,     -127};
    std::fill(d.weightScale.begin(), d.weightScale.end(), 1.0f);
    std::fill(d.stored.begin(), d.stored.end(), std::uint8_t{0});
    for (std::size_t i = 0; i < kSIZE; ++i) d.stored[i * kSIZE + i] = 1;
    const std::vector<float> expected = {127, 0,    2, 2,  0,  -2, -2, 4,
                                         126, -126, 0, 64, 64, 1,  2,  -127};
    for (std::size_t tokens : {std::size_t{1}, std::size_t{5}}) {
        Case many = c;
        many.tokens = tokens;
        Data repeated = d;
        for (std::size_t t = 1; t < tokens; ++t) {
            repeated.x.insert(repeated.x.end(), d.x.begin(), d.x.end());
        }
        for (const DotKernels* dots : allDots()) {
            useDots(dots->name);
            const Bytes y = run(many, repeated, kSERIAL, 0, tokens);
            for (std::size_t i = 0; i < tokens * kSIZE; ++i) {
                EXPECT(valueAt(y, c.type, i) == expected[i % kSIZE]);
            }
        }
    }
    useVariant(variants().back()->name);
}

// NaN and infinity stay visible in their token and touch no other; tiny and huge values do not
// overflow on the way to their integers.
void extremesStayTheirOwn() {
    constexpr float kNAN = std::numeric_limits<float>::quiet_NaN();
    constexpr float kINFINITY = std::numeric_limits<float>::infinity();
    for (std::size_t tokens : {std::size_t{3}, std::size_t{8}}) {
        Case c = integerCase(tokens, 64, 20, {8, 16}, WeightType::kINT8, 2, 32);
        for (float extreme : {kNAN, kINFINITY, 3e38f, 1e-44f, 0.0f}) {
            Data d = makeData(c, 11);
            const Bytes before = run(c, d, kSERIAL, 0, tokens);
            for (std::size_t i = 0; i < 64; ++i) d.x[64 + i] = i == 40 ? extreme : 0.0f;
            const Bytes y = run(c, d, kSERIAL, 0, tokens);
            for (std::size_t i = 0; i < tokens * 20; ++i) {
                const float value = valueAt(y, c.type, i);
                if (i / 20 != 1) {
                    EXPECT(value == valueAt(before, c.type, i));
                } else if (std::isfinite(extreme)) {
                    const double w = static_cast<double>(d.w[40 * 20 + i % 20]);
                    const double expected = static_cast<double>(extreme) * w;
                    const bool overflows = std::fabs(expected) > 3.4e38;
                    EXPECT(overflows || std::fabs(static_cast<double>(value) - expected) <=
                                            1e-6 * std::fabs(expected) + 1e-40);
                } else {
                    EXPECT(std::isnan(value));
                }
            }
            isTheSameEverywhere(c, d, y);
        }
    }
}

// So many columns that threads share them, and the selection for few tokens beforehand.
void fewTokensOnManyThreads() {
    unsigned seed = 900;
    const auto check = [&](const Case& c) {
        const Data d = makeData(c, ++seed);
        const Bytes y = run(c, d, kSERIAL, 0, c.tokens);
        isRight(c, d, y);
        isTheSameEverywhere(c, d, y);
    };
    for (std::size_t tokens : {1, 2, 3}) {
        check(integerCase(tokens, 576, 1000, {8, 16}, WeightType::kINT8, 1, 32));
        check(integerCase(tokens, 576, 1000, {16, 16}, WeightType::kINT8, 1, 32));
        check(integerCase(tokens, 544, 600, {3, 16}, WeightType::kINT8, 1, 32));
        check(integerCase(tokens, 576, 600, {5, 24}, WeightType::kINT8, 1, 48));
        check(integerCase(tokens, 576, 600, {5, 32}, WeightType::kINT8, 1, 16));
        check(integerCase(tokens, 576, 600, {8, 16}, WeightType::kINT4, 9, 32));
        for (unsigned flags = 0; flags < 32; ++flags) {
            Case c = integerCase(tokens, 320, 600, {8, 16}, WeightType::kINT8, 1, 32);
            c.order = flags & 1;
            c.scale = flags & 2;
            c.variance = flags & 4;
            c.valueScale = flags & 8;
            c.dynamic = flags & 16;
            c.shift = !c.dynamic && tokens > 1;
            c.perChannelShift = tokens > 2;
            check(c);
        }
    }
}

void noTokens() {
    const Case c = integerCase(1, 32, 8, {8, 16}, WeightType::kINT8, 1, 32);
    EXPECT(run(c, makeData(c, 9), kSERIAL, 0, 0).empty());
}

}  // namespace

int main() {
    integerCases();
    tiesGoToEven();
    extremesStayTheirOwn();
    fewTokensOnManyThreads();
    noTokens();
    return report("integers");
}
