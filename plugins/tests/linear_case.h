// A case of NMLinear for tests: its inputs, the contract in float64, and the kernel's own answer.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <thread>
#include <utility>

#include "check.h"
#include "dots.h"
#include "group_scales.h"
#include "nm_linear.h"
#include "ranking.h"

namespace nmexport::test {

struct Case {
    std::size_t tokens, channels, outputs;
    Pattern pattern;
    ElementType type = ElementType::kFLOAT32;
    bool order = false, scale = false, bias = false, shift = false, perChannelShift = false;
    bool dynamic = false, variance = false, keepAll = false;
    bool valueScale = false;
    // Of integer weights.
    WeightType weights = WeightType::kELEMENT;
    std::size_t scaleGroups = 0;
    ZeroPoints zeroPoints = ZeroPoints::kNONE;
    bool halves = false;              // scales, and minima in place of zero points, in float16
    std::size_t activationBlock = 0;  // 0: values stay in floating point
};

// Inputs of a case, kept as float32 and as T.
struct Data {
    std::vector<float> x, w, bias, shift, shiftWeight, scale, valueScale;
    std::vector<std::int32_t> order;
    std::vector<std::uint16_t> x16, w16, bias16;
    std::vector<float> weightScale;
    std::vector<std::uint8_t> stored, storedZeros;
    std::vector<float> zeros;
};

// The least and the greatest integer of a type of weights.
inline std::pair<int, int> rangeOf(WeightType type) {
    if (type == WeightType::kINT8) return {-128, 127};
    return type == WeightType::kINT4 ? std::pair{-8, 7} : std::pair{0, 15};
}

// Integers, spread over their range or drawn at its ends, as W stores them.
inline std::vector<int> integers(WeightType type, std::size_t count, std::mt19937& random) {
    const auto [least, most] = rangeOf(type);
    std::uniform_int_distribution<int> spread(least, most);
    std::vector<int> values(count);
    for (int& value : values) {
        value = random() % 8 == 0 ? (random() % 2 == 0 ? least : most) : spread(random);
    }
    return values;
}

inline std::vector<std::uint8_t> stored(WeightType type, const std::vector<int>& values) {
    std::vector<std::uint8_t> bytes;
    if (type == WeightType::kINT8) {
        for (int value : values) bytes.push_back(static_cast<std::uint8_t>(value));
    } else {
        for (std::size_t i = 0; i < values.size(); i += 2) {
            bytes.push_back(
                static_cast<std::uint8_t>((values[i] & 15) | (values[i + 1] & 15) << 4));
        }
    }
    return bytes;
}

inline std::vector<std::uint16_t> narrowed(std::vector<float>& values, ElementType type) {
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

// Zero points of a case. What they take from weights is returned: zero points times scales.
inline std::vector<double> zeroPoints(const Case& c, Data& d, std::mt19937& random) {
    const std::size_t count = c.scaleGroups * c.outputs;
    std::vector<double> points(count, 0.0);
    if (c.zeroPoints == ZeroPoints::kINTEGERS) {
        const std::vector<int> whole = integers(c.weights, count, random);
        d.storedZeros = stored(c.weights, whole);
        points.assign(whole.begin(), whole.end());
    } else if (c.zeroPoints == ZeroPoints::kFLOATS) {
        const auto [least, most] = rangeOf(c.weights);
        std::uniform_real_distribution<float> between(static_cast<float>(least),
                                                      static_cast<float>(most));
        d.zeros.resize(count);
        for (float& zero : d.zeros) zero = between(random);
        points.assign(d.zeros.begin(), d.zeros.end());
    }
    if (c.zeroPoints == ZeroPoints::kFLOATS && c.halves) {
        for (std::size_t i = 0; i < count; ++i) d.zeros[i] *= d.weightScale[i];
        narrowed(d.zeros, ElementType::kFLOAT16);
        points.assign(d.zeros.begin(), d.zeros.end());
        for (std::size_t i = 0; i < count; ++i) d.zeros[i] /= d.weightScale[i];
        return points;
    }
    for (std::size_t i = 0; i < count; ++i) points[i] *= static_cast<double>(d.weightScale[i]);
    return points;
}

inline std::shared_ptr<char> allocated(std::size_t bytes) {
    void* memory =
        std::aligned_alloc(kALIGNMENT, (bytes + kALIGNMENT - 1) / kALIGNMENT * kALIGNMENT);
    return {static_cast<char*>(memory), std::free};
}

// As the kernels read them that are active now; null where they read what the case has.
inline std::unique_ptr<GroupScales> groupScalesOf(const Case& c, const Data& d) {
    const bool between = c.zeroPoints == ZeroPoints::kFLOATS;
    if (c.weights == WeightType::kELEMENT || c.activationBlock == 0) return nullptr;
    if (c.scaleGroups == 1 && !between) return nullptr;
    return std::make_unique<GroupScales>(activeDots(), c.weights, c.scaleGroups, c.outputs,
                                         d.weightScale.data(), c.zeroPoints,
                                         between ? d.zeros.data() : nullptr, allocated);
}

// Integer weights with scales and zero points; `w` becomes what they stand for.
inline void quantise(const Case& c, Data& d, std::mt19937& random) {
    d.weightScale = normals(random, c.scaleGroups * c.outputs);
    if (c.halves) narrowed(d.weightScale, ElementType::kFLOAT16);
    const std::vector<int> whole = integers(c.weights, c.channels * c.outputs, random);
    d.stored = stored(c.weights, whole);
    const std::vector<double> offsets = zeroPoints(c, d, random);
    const std::size_t rows = c.channels / c.scaleGroups;
    for (std::size_t i = 0; i < d.w.size(); ++i) {
        const std::size_t scale = i / c.outputs / rows * c.outputs + i % c.outputs;
        const double scaled =
            static_cast<double>(whole[i]) * static_cast<double>(d.weightScale[scale]);
        d.w[i] = static_cast<float>(scaled - offsets[scale]);
    }
}

inline Data makeData(const Case& c, unsigned seed) {
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
        if (c.weights == WeightType::kELEMENT) d.w16 = narrowed(d.w, c.type);
        d.bias16 = narrowed(d.bias, c.type);
    }
    if (c.weights != WeightType::kELEMENT) quantise(c, d, random);
    return d;
}

inline const ThreadPool kSERIAL{
    [](void*, std::size_t tasks, void (*task)(void*, std::size_t), void* state) {
        for (std::size_t i = 0; i < tasks; ++i) task(state, i);
    },
    nullptr, 1};

// Three real threads, tasks in reverse order; loops that start fast are cut the finest.
inline const ThreadPool kTHREADED{
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
    nullptr, 7, true};

using Bytes = std::vector<unsigned char>;

inline Bytes run(const Case& c, const Data& d, const ThreadPool& pool, std::size_t firstToken,
                 std::size_t tokens) {
    const bool wide = c.type == ElementType::kFLOAT32;
    const std::size_t bytes = elementBytes(c.type);
    Bytes y(tokens * c.outputs * bytes);
    const std::unique_ptr<GroupScales> scales = groupScalesOf(c, d);
    if (scales != nullptr) EXPECT(scales->areHalves() == c.halves);
    LinearArguments a{};
    a.type = c.type;
    a.x = wide ? static_cast<const void*>(d.x.data() + firstToken * c.channels)
               : static_cast<const void*>(d.x16.data() + firstToken * c.channels);
    a.w = wide ? static_cast<const void*>(d.w.data()) : static_cast<const void*>(d.w16.data());
    if (c.bias) {
        a.bias = wide ? static_cast<const void*>(d.bias.data())
                      : static_cast<const void*>(d.bias16.data());
    }
    if (c.weights != WeightType::kELEMENT) {
        a.w = d.stored.data();
        a.weightType = c.weights;
        a.weightScale = d.weightScale.data();
        a.scaleGroups = c.scaleGroups;
        a.zeroPoints = c.zeroPoints;
        a.weightZero = c.zeroPoints == ZeroPoints::kINTEGERS
                           ? static_cast<const void*>(d.storedZeros.data())
                           : static_cast<const void*>(d.zeros.data());
        a.groupScales = scales.get();
        a.activationBits = c.activationBlock == 0 ? 0 : 8;
        a.activationBlock = c.activationBlock;
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
inline Bytes runGathered(const Case& c, const Data& given, const ThreadPool& pool) {
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

inline double populationVariance(const std::vector<double>& values) {
    double mean = 0, sum = 0;
    for (double value : values) mean += value;
    mean /= static_cast<double>(values.size());
    for (double value : values) sum += (value - mean) * (value - mean);
    return sum / static_cast<double>(values.size());
}

// What the values of each block turn into: an integer of 8 bits times the block's scale.
inline std::vector<double> quantised(const Case& c, const std::vector<double>& s) {
    std::vector<double> out(s.size());
    for (std::size_t begin = 0; begin < s.size(); begin += c.activationBlock) {
        float largest = 0.0f;
        for (std::size_t i = begin; i < begin + c.activationBlock; ++i) {
            largest = std::max(largest, std::fabs(static_cast<float>(s[i])));
        }
        for (std::size_t i = begin; i < begin + c.activationBlock && largest > 0.0f; ++i) {
            // In float32: a tie may fall either way, and the kernels divide in float32.
            const float q = std::nearbyint(static_cast<float>(s[i]) * 127.0f / largest);
            out[i] = static_cast<double>(q) * static_cast<double>(largest) / 127.0;
        }
    }
    return out;
}

// The contract in float64, one token.
inline std::vector<double> expectedToken(const Case& c, const Data& d, std::size_t token) {
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
        std::sort(group.begin(), group.end(), [&](std::size_t a, std::size_t b) {
            return ranksBefore(score(a), a, score(b), b);
        });
        const std::size_t kept = c.keepAll ? m : static_cast<std::size_t>(c.pattern.n);
        for (std::size_t j = 0; j < kept; ++j) s[group[j]] = static_cast<double>(z[group[j]]);
    }
    double nu = 1;
    if (c.variance && !c.keepAll && c.pattern.n != c.pattern.m) {
        nu = std::sqrt(populationVariance(dense) / std::max(populationVariance(s), 1e-12));
    }
    for (std::size_t i = 0; c.valueScale && i < k; ++i) {
        s[i] = static_cast<double>(static_cast<float>(s[i]) * d.valueScale[i]);
    }
    if (c.activationBlock != 0) s = quantised(c, s);
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

inline float valueAt(const Bytes& y, ElementType type, std::size_t i) {
    if (type == ElementType::kFLOAT32) {
        float value;
        std::memcpy(&value, y.data() + i * 4, 4);
        return value;
    }
    std::uint16_t bits;
    std::memcpy(&bits, y.data() + i * 2, 2);
    return type == ElementType::kFLOAT16 ? toFloat(Float16{bits}) : toFloat(BFloat16{bits});
}

inline void isRight(const Case& c, const Data& d, const Bytes& y) {
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

// Integer kernels that this processor can run.
inline std::vector<const DotKernels*> allDots() {
    std::vector<const DotKernels*> found{&portableDots()};
    for (const DotKernels* dots :
         {avx2Dots(), avxVnniDots(), avx512VnniDots(), neonDots(), neonDotProductDots()}) {
        if (dots != nullptr) found.push_back(dots);
    }
    return found;
}

inline Bytes lastOf(const Bytes& y, std::size_t count) {
    return Bytes(y.end() - static_cast<std::ptrdiff_t>(count), y.end());
}

// The same bits from every variant, cache, thread count and split of the batch, and from an X that
// was gathered before.
inline void isTheSameEverywhere(const Case& c, const Data& d, const Bytes& y) {
    const std::size_t rowBytes = c.outputs * elementBytes(c.type);
    const Cache chosen = cacheAhead();
    for (const Variant* variant : variants()) {
        useVariant(variant->name);
        for (Cache cache : {Cache::kFIRST_LEVEL, Cache::kSECOND_LEVEL}) {
            useCacheAhead(cache);
            EXPECT(run(c, d, kSERIAL, 0, c.tokens) == y);
        }
        useCacheAhead(chosen);
        for (const DotKernels* dots : allDots()) {
            if (c.activationBlock == 0) break;
            useDots(dots->name);
            EXPECT(run(c, d, kSERIAL, 0, c.tokens) == y);
            EXPECT(run(c, d, kTHREADED, c.tokens - 1, 1) == lastOf(y, rowBytes));
        }
        useVariant(variant->name);
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

}  // namespace nmexport::test
