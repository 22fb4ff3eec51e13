// NMLinear and NMPrune over raw pointers: right against float64, and the same bits however the
// work is cut: by variant, thread, batch, neighbour or chunk.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <thread>

#include "check.h"
#include "nm_linear.h"
#include "nm_prune.h"

using namespace nmexport;
using namespace nmexport::test;

namespace {

struct Case {
    std::size_t tokens, channels, outputs;
    Pattern pattern;
    ElementType type = ElementType::kFLOAT32;
    bool order = false, scale = false, bias = false, shift = false, perChannelShift = false;
    bool dynamic = false, variance = false, keepAll = false;
    std::size_t scaleGroups = 0;  // of int8 weights; 0 has weights of the type
    bool valueScale = false;
};

// Inputs of a case, kept as float32 and as T.
struct Data {
    std::vector<float> x, w, bias, shift, shiftWeight, scale, valueScale;
    std::vector<std::int32_t> order;
    std::vector<std::uint16_t> x16, w16, bias16;
    std::vector<std::int8_t> w8;
    std::vector<float> weightScale;
};

// Int8 weights and their scales; `w` becomes what they stand for.
void quantise(const Case& c, Data& d, std::mt19937& random) {
    d.weightScale = normals(random, c.scaleGroups * c.outputs);
    d.w8.resize(d.w.size());
    const std::size_t rows = c.channels / c.scaleGroups;
    for (std::size_t i = 0; i < d.w.size(); ++i) {
        const int value = static_cast<int>(d.w[i] * 40.0f);
        d.w8[i] = static_cast<std::int8_t>(std::min(127, std::max(-127, value)));
        const std::size_t channel = i / c.outputs;
        d.w[i] =
            static_cast<float>(d.w8[i]) * d.weightScale[channel / rows * c.outputs + i % c.outputs];
    }
}

std::vector<std::uint16_t> narrowed(std::vector<float>& values, ElementType type) {
    std::vector<std::uint16_t> bits(values.size());
    for (std::size_t i = 0; i < values.size(); ++i) {
        if (type == ElementType::kFLOAT16) {
            Float16 half{0};
            fromFloat(values[i], &half);
            bits[i] = half.bits;
            values[i] = toFloat(half);
        } else {
            BFloat16 half{0};
            fromFloat(values[i], &half);
            bits[i] = half.bits;
            values[i] = toFloat(half);
        }
    }
    return bits;
}

Data makeData(const Case& c, unsigned seed) {
    std::mt19937 random(seed);
    Data d;
    d.x = normals(random, c.tokens * c.channels);
    d.w = normals(random, c.channels * c.outputs);
    if (c.bias) d.bias = normals(random, c.outputs);
    if (c.shift) d.shift = normals(random, c.perChannelShift ? c.channels : 1);
    if (c.dynamic) d.shiftWeight = normals(random, c.outputs);
    if (c.scale) {
        d.scale = normals(random, c.channels);
        for (float& value : d.scale) value = std::fabs(value);
    }
    if (c.valueScale) d.valueScale = normals(random, c.channels);
    if (c.order) {
        d.order.resize(c.channels);
        std::iota(d.order.begin(), d.order.end(), 0);
        std::shuffle(d.order.begin(), d.order.end(), random);
    }
    if (c.type != ElementType::kFLOAT32) {
        d.x16 = narrowed(d.x, c.type);
        if (c.scaleGroups == 0) d.w16 = narrowed(d.w, c.type);
        d.bias16 = narrowed(d.bias, c.type);
    }
    if (c.scaleGroups != 0) quantise(c, d, random);
    return d;
}

const ThreadPool kSERIAL{
    [](void*, std::size_t tasks, void (*task)(void*, std::size_t), void* state) {
        for (std::size_t i = 0; i < tasks; ++i) task(state, i);
    },
    nullptr, 1};

// Three real threads, tasks in reverse order.
const ThreadPool kTHREADED{
    [](void*, std::size_t tasks, void (*task)(void*, std::size_t), void* state) {
        std::vector<std::thread> threads;
        for (std::size_t lane = 0; lane < 3; ++lane) {
            threads.emplace_back([=] {
                for (std::size_t i = tasks; i-- > 0;) {
                    if (i % 3 == lane) task(state, i);
                }
            });
        }
        for (std::thread& thread : threads) thread.join();
    },
    nullptr, 7};

using Bytes = std::vector<unsigned char>;

Bytes run(const Case& c, const Data& d, const ThreadPool& pool, std::size_t firstToken,
          std::size_t tokens) {
    const bool wide = c.type == ElementType::kFLOAT32;
    const std::size_t bytes = elementBytes(c.type);
    Bytes y(tokens * c.outputs * bytes);
    LinearArguments a{};
    a.type = c.type;
    a.x = wide ? static_cast<const void*>(d.x.data() + firstToken * c.channels)
               : static_cast<const void*>(d.x16.data() + firstToken * c.channels);
    a.w = wide ? static_cast<const void*>(d.w.data()) : static_cast<const void*>(d.w16.data());
    if (c.bias) {
        a.bias = wide ? static_cast<const void*>(d.bias.data())
                      : static_cast<const void*>(d.bias16.data());
    }
    if (c.scaleGroups != 0) {
        a.w = d.w8.data();
        a.weightScale = d.weightScale.data();
        a.scaleGroups = c.scaleGroups;
    }
    a.shiftWeight = c.dynamic ? d.shiftWeight.data() : nullptr;
    a.y = y.data();
    a.tokens = tokens;
    a.channels = c.channels;
    a.outputs = c.outputs;
    a.pattern = c.pattern;
    a.constants.shift = c.shift ? d.shift.data() : nullptr;
    a.constants.shiftCount = d.shift.size();
    a.constants.scoreScale = c.scale ? d.scale.data() : nullptr;
    a.constants.channelOrder = c.order ? d.order.data() : nullptr;
    a.constants.dynamicShift = c.dynamic;
    a.varianceCorrection = c.variance;
    a.varianceFloor = 1e-12;
    a.keepAll = c.keepAll;
    a.valueScale = c.valueScale ? d.valueScale.data() : nullptr;
    ConstantsCopy copy;  // every other token as a session does it
    if (firstToken % 2 == 0) {
        copy.place(a);
        copy.prefetch();
    }
    nmLinear(a, pool);
    return y;
}

// What the contract calls the same: without an order, from an X whose channels lie in that order.
Bytes runGathered(const Case& c, const Data& given, const ThreadPool& pool) {
    Case plain = c;
    plain.order = false;
    Data d = given;
    const auto gather = [&](const auto& from, auto& to) {
        for (std::size_t i = 0; i < from.size(); ++i) {
            const std::size_t channel = static_cast<std::size_t>(d.order[i % c.channels]);
            to[i] = from[i / c.channels * c.channels + channel];
        }
    };
    gather(given.x, d.x);
    gather(given.x16, d.x16);
    return run(plain, d, pool, 0, c.tokens);
}

double populationVariance(const std::vector<double>& values) {
    double mean = 0, sum = 0;
    for (double value : values) mean += value;
    mean /= static_cast<double>(values.size());
    for (double value : values) sum += (value - mean) * (value - mean);
    return sum / static_cast<double>(values.size());
}

// The contract in float64, one token.
std::vector<double> expectedToken(const Case& c, const Data& d, std::size_t token) {
    const std::size_t k = c.channels;
    std::vector<float> x(k);
    for (std::size_t p = 0; p < k; ++p) {
        x[p] = d.x[token * k + (c.order ? static_cast<std::size_t>(d.order[p]) : p)];
    }
    float eta = 0;
    if (c.dynamic) {
        double sum = 0;
        for (float value : x) sum += static_cast<double>(value);
        eta = static_cast<float>(sum / static_cast<double>(k));
    }
    std::vector<float> z(k);
    for (std::size_t i = 0; i < k; ++i) {
        z[i] = x[i] - (c.shift ? d.shift[c.perChannelShift ? i : 0] : eta);
    }
    std::vector<double> s(k, 0.0), dense(z.begin(), z.end());
    const std::size_t m = static_cast<std::size_t>(c.pattern.m);
    for (std::size_t g = 0; g < k; g += m) {
        std::vector<std::size_t> group(m);
        std::iota(group.begin(), group.end(), g);
        const auto score = [&](std::size_t i) {
            const float magnitude = std::fabs(z[i]);
            return c.scale ? magnitude * d.scale[i] : magnitude;
        };
        std::stable_sort(group.begin(), group.end(),
                         [&](std::size_t a, std::size_t b) { return score(a) > score(b); });
        const std::size_t kept = c.keepAll ? m : static_cast<std::size_t>(c.pattern.n);
        for (std::size_t j = 0; j < kept; ++j) s[group[j]] = static_cast<double>(z[group[j]]);
    }
    double nu = 1;
    if (c.variance && !c.keepAll && c.pattern.n != c.pattern.m) {
        nu = std::sqrt(populationVariance(dense) / std::max(populationVariance(s), 1e-12));
    }
    for (std::size_t i = 0; c.valueScale && i < k; ++i) {
        s[i] *= static_cast<double>(d.valueScale[i]);
    }
    std::vector<double> y(c.outputs, 0.0);
    for (std::size_t o = 0; o < c.outputs; ++o) {
        for (std::size_t i = 0; i < k; ++i) {
            y[o] += s[i] * static_cast<double>(d.w[i * c.outputs + o]);
        }
        y[o] *= nu;
        if (c.dynamic) y[o] += static_cast<double>(eta) * static_cast<double>(d.shiftWeight[o]);
        if (c.bias) y[o] += static_cast<double>(d.bias[o]);
    }
    return y;
}

float valueAt(const Bytes& y, ElementType type, std::size_t i) {
    if (type == ElementType::kFLOAT32) {
        float value;
        std::memcpy(&value, y.data() + i * 4, 4);
        return value;
    }
    std::uint16_t bits;
    std::memcpy(&bits, y.data() + i * 2, 2);
    return type == ElementType::kFLOAT16 ? toFloat(Float16{bits}) : toFloat(BFloat16{bits});
}

void isRight(const Case& c, const Data& d, const Bytes& y) {
    double ulp = 0.0;
    if (c.type == ElementType::kFLOAT16) ulp = 0x1p-10;
    if (c.type == ElementType::kBFLOAT16) ulp = 0x1p-7;
    const double root = std::sqrt(static_cast<double>(c.channels));
    for (std::size_t t = 0; t < c.tokens; ++t) {
        const std::vector<double> expected = expectedToken(c, d, t);
        double largest = 0;
        for (double value : expected) largest = std::max(largest, std::fabs(value));
        for (std::size_t o = 0; o < c.outputs; ++o) {
            const double got = static_cast<double>(valueAt(y, c.type, t * c.outputs + o));
            const double allowed =
                1e-6 * root * std::max(largest, 1.0) + 2 * ulp * std::fabs(expected[o]) + 1e-7;
            EXPECT(std::fabs(got - expected[o]) <= allowed);
        }
    }
}

// The same bits from every variant, cache, thread count and split of the batch, and from an X that
// was gathered before.
void isTheSameEverywhere(const Case& c, const Data& d, const Bytes& y) {
    const std::size_t rowBytes = c.outputs * elementBytes(c.type);
    const Cache chosen = cacheAhead();
    for (const Variant* variant : variants()) {
        useVariant(variant->name);
        for (Cache cache : {Cache::kFIRST_LEVEL, Cache::kSECOND_LEVEL}) {
            useCacheAhead(cache);
            EXPECT(run(c, d, kSERIAL, 0, c.tokens) == y);
        }
        useCacheAhead(chosen);
        EXPECT(run(c, d, kTHREADED, 0, c.tokens) == y);
        if (c.order) EXPECT(runGathered(c, d, kTHREADED) == y);
        for (std::size_t token : {std::size_t{0}, c.tokens / 2, c.tokens - 1}) {
            const Bytes alone = run(c, d, kSERIAL, token, 1);
            EXPECT(std::memcmp(alone.data(), y.data() + token * rowBytes, rowBytes) == 0);
        }
        if (c.tokens >= 5) {
            const Bytes part = run(c, d, kTHREADED, 2, 3);
            EXPECT(std::memcmp(part.data(), y.data() + 2 * rowBytes, part.size()) == 0);
        }
    }
    useVariant(variants().back()->name);
}

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
                    c.scaleGroups = groups;
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
