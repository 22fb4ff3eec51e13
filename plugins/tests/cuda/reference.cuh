// Problems for the kernels on a GPU, and what the op contract says of them in float64.
#pragma once

#include "../ranking.h"
#include "device_array.cuh"
#include "element.cuh"
#include "nm_cuda.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <type_traits>
#include <vector>

namespace nmexport::cuda {

template <typename T>
float widen(T value) {
    if constexpr (std::is_same_v<T, float>) {
        return value;
    } else if constexpr (std::is_same_v<T, __half>) {
        return __half2float(value);
    } else {
        return __bfloat162float(value);
    }
}

template <typename T>
T narrow(float value) {
    if constexpr (std::is_same_v<T, float>) {
        return value;
    } else if constexpr (std::is_same_v<T, __half>) {
        return __float2half(value);
    } else {
        return __float2bfloat16(value);
    }
}

template <typename T>
constexpr DType kTYPE = std::is_same_v<T, float>    ? DType::kFLOAT32
                        : std::is_same_v<T, __half> ? DType::kFLOAT16
                                                    : DType::kBFLOAT16;

enum class Options {
    kNONE,
    kSTATIC,   //!< order, scales of scores and values, shifts, bias, variance correction
    kORDER,    //!< a channel order by bare magnitude, bias
    kSCALAR,   //!< one shift for all channels, bias
    kSCALED,   //!< as kSTATIC, without the variance correction
    kDYNAMIC,  //!< the token's own shift, its weight, bias, variance correction
};

struct Case {
    int tokens;
    int channels;
    int outputs;
    int n;
    int m;
    Options options;
    bool hasTies;

    bool is(Options wanted) const { return options == wanted; }

    bool hasScales() const { return is(Options::kSTATIC) || is(Options::kSCALED); }

    bool hasOrder() const { return hasScales() || is(Options::kORDER); }

    bool hasShift() const { return hasScales() || is(Options::kSCALAR); }

    bool correctsVariance() const { return is(Options::kSTATIC) || is(Options::kDYNAMIC); }
};

//! What a case is made of, on the host.
template <typename T>
struct Problem {
    std::vector<T> x;
    std::vector<T> w;
    std::vector<T> bias;
    std::vector<float> shift;  //!< [K], or [1]
    std::vector<float> shiftWeight;
    std::vector<float> scale;
    std::vector<float> valueScale;
    std::vector<int32_t> order;
    std::vector<float> product;  //!< what an epilogue is given
};

template <typename T>
Problem<T> problemOf(Case const& c) {
    std::mt19937 random(static_cast<unsigned>(c.tokens * 131 + c.channels * 7 + c.outputs + c.n));
    std::normal_distribution<float> normal;
    auto const floats = [&](int count, auto const& value) {
        std::vector<float> values(count);
        std::generate(values.begin(), values.end(), value);
        return values;
    };
    auto const elements = [&](int count, auto const& value) {
        std::vector<T> values(count);
        std::generate(values.begin(), values.end(), [&] { return narrow<T>(value()); });
        return values;
    };
    // A dynamic shift is a mean. Sixteenths that every type holds exactly have one sum in whatever
    // order, so that all kernels rank by the same shift and masks can be compared bit by bit.
    auto const sixteenths = [&] {
        return std::clamp(std::round(16 * normal(random)) / 16, -7.0F, 7.0F);
    };
    Problem<T> p;
    int const count = c.tokens * c.channels;
    if (c.hasTies) {
        p.x = elements(count, [&] { return static_cast<float>(random() % 5) - 2.0F; });
    } else {
        p.x = c.is(Options::kDYNAMIC) ? elements(count, sixteenths)
                                      : elements(count, [&] { return normal(random); });
    }
    float const deviation = 1.0F / std::sqrt(static_cast<float>(c.channels));
    p.w = elements(c.channels * c.outputs, [&] { return deviation * normal(random); });
    p.bias = elements(c.outputs, [&] { return normal(random); });
    p.shift =
        floats(c.is(Options::kSCALAR) ? 1 : c.channels, [&] { return 0.1F * normal(random); });
    p.shiftWeight = floats(c.outputs, [&] { return normal(random); });
    p.scale = floats(c.channels, [&] { return 0.5F + std::fabs(normal(random)); });
    p.valueScale = floats(c.channels, [&] { return 0.5F + std::fabs(normal(random)); });
    p.product = floats(c.tokens * c.outputs, [&] { return normal(random); });
    p.order.resize(c.channels);
    std::iota(p.order.begin(), p.order.end(), 0);
    std::shuffle(p.order.begin(), p.order.end(), random);
    return p;
}

//! What the contract says of one token. All but `order` lies by position.
struct Expected {
    float eta{0};
    double nu{1};
    std::vector<float> z;
    std::vector<bool> keep;
    std::vector<float> s;  //!< scaled z where kept, else 0
    std::vector<double> y;
    std::vector<double> epilogue;  //!< of the problem's product
};

//! The positions of each group in order of their scores; of equal ones the earlier first.
std::vector<bool> keepOf(Case const& c, std::vector<float> const& score) {
    std::vector<bool> keep(c.channels);
    for (int first = 0; first < c.channels; first += c.m) {
        std::vector<std::size_t> group(c.m);
        std::iota(group.begin(), group.end(), static_cast<std::size_t>(first));
        std::sort(group.begin(), group.end(), [&](std::size_t a, std::size_t b) {
            return test::ranksBefore(score[a], a, score[b], b);
        });
        for (int i = 0; i < c.n; ++i) {
            keep[group[i]] = true;
        }
    }
    return keep;
}

//! sqrt(var(z) / var(s)).
double correctionOf(std::vector<float> const& z, std::vector<bool> const& keep) {
    double sums[4] = {};
    for (size_t k = 0; k < z.size(); ++k) {
        double const s = keep[k] ? z[k] : 0.0;
        sums[0] += z[k];
        sums[1] += static_cast<double>(z[k]) * z[k];
        sums[2] += s;
        sums[3] += s * s;
    }
    double const count = static_cast<double>(z.size());
    double const varAll = sums[1] / count - sums[0] * sums[0] / count / count;
    double const varKept = sums[3] / count - sums[2] * sums[2] / count / count;
    return std::sqrt(varAll / std::max(varKept, 1e-12));
}

template <typename T>
Expected expect(Case const& c, Problem<T> const& p, int token) {
    Expected out;
    T const* const x = p.x.data() + static_cast<size_t>(token) * c.channels;
    if (c.is(Options::kDYNAMIC)) {
        out.eta = std::accumulate(x, x + c.channels, 0.0F,
                                  [](float sum, T value) { return sum + widen(value); }) /
                  static_cast<float>(c.channels);
    }
    std::vector<float> score(c.channels);
    for (int k = 0; k < c.channels; ++k) {
        float const shift = c.hasShift() ? p.shift[c.is(Options::kSCALAR) ? 0 : k] : out.eta;
        out.z.push_back(widen(x[c.hasOrder() ? p.order[k] : k]) - shift);
        float volatile const product = std::fabs(out.z[k]) * (c.hasScales() ? p.scale[k] : 1.0F);
        score[k] = product;
    }
    out.keep = keepOf(c, score);
    out.nu = c.correctsVariance() ? correctionOf(out.z, out.keep) : 1.0;
    for (int k = 0; k < c.channels; ++k) {
        float const scale = c.hasScales() ? p.valueScale[k] : 1.0F;
        out.s.push_back(out.keep[k] ? scale * out.z[k] : 0.0F);
    }
    for (int o = 0; o < c.outputs; ++o) {
        double sum = 0;
        for (int k = 0; k < c.channels; ++k) {
            double const weight = widen(p.w[static_cast<size_t>(k) * c.outputs + o]);
            sum += out.s[k] * weight;
        }
        double const added =
            (c.is(Options::kDYNAMIC) ? static_cast<double>(out.eta) * p.shiftWeight[o] : 0.0) +
            (c.is(Options::kNONE) ? 0.0 : widen(p.bias[o]));
        out.y.push_back(out.nu * sum + added);
        out.epilogue.push_back(out.nu * p.product[static_cast<size_t>(token) * c.outputs + o] +
                               added);
    }
    return out;
}

//! Two units in the last place of T, and a float32 term relative to the values' size.
template <typename T>
bool isClose(T const* values, std::vector<double> const& expected, double relative) {
    double square = 0;
    for (double const value : expected) {
        square += value * value / static_cast<double>(expected.size());
    }
    bool ok = true;
    for (size_t i = 0; i < expected.size(); ++i) {
        double const magnitude = std::fabs(expected[i]);
        int const bits = std::is_same_v<T, __half> ? 10 : 7;
        double const ulp = std::exp2(std::floor(std::log2(std::max(magnitude, 6e-5))) - bits);
        double const rounding = std::is_same_v<T, float> ? 0.0 : 2 * ulp;
        double const allowed = relative * std::max(magnitude, std::sqrt(square)) + rounding;
        ok = ok && std::fabs(widen(values[i]) - expected[i]) <= allowed;  // false for NaN
    }
    return ok;
}

//! The problem on the device, and what its kernels are given.
template <typename T>
struct Launches {
    explicit Launches(Case const& c, Problem<T> const& p)
        : x(p.x),
          w(p.w),
          bias(p.bias),
          shift(p.shift),
          shiftWeight(p.shiftWeight),
          scale(p.scale),
          valueScale(p.valueScale),
          product(p.product),
          order(p.order),
          y(static_cast<size_t>(c.tokens) * c.outputs),
          epilogue(y.count),
          s(p.x.size()),
          keep(p.x.size()),
          eta(c.tokens),
          nu(c.tokens) {
        Selection selection{};
        selection.n = c.n;
        selection.m = c.m;
        selection.dynamicShift = c.is(Options::kDYNAMIC);
        selection.varianceCorrection = c.correctsVariance();
        if (c.hasShift()) {
            selection.shift = shift.data;
            selection.shiftLength = static_cast<int32_t>(shift.count);
        }
        if (c.hasOrder()) {
            selection.channelOrder = order.data;
        }
        if (c.hasScales()) {
            selection.scoreScale = scale.data;
            selection.valueScale = valueScale.data;
        }
        decodeArgs = {kTYPE<T>,
                      c.tokens,
                      c.channels,
                      c.outputs,
                      selection,
                      x.data,
                      w.data,
                      c.is(Options::kNONE) ? nullptr : bias.data,
                      selection.dynamicShift ? shiftWeight.data : nullptr,
                      y.data};
        maskArgs = {kTYPE<T>, c.tokens, c.channels, selection, x.data,
                    true,     s.data,   keep.data,  eta.data,  nu.data};
        epilogueArgs = {kTYPE<T>,
                        c.tokens,
                        c.outputs,
                        product.data,
                        selection.dynamicShift ? eta.data : nullptr,
                        selection.varianceCorrection ? nu.data : nullptr,
                        decodeArgs.shiftWeight,
                        decodeArgs.bias,
                        epilogue.data};
    }

    DeviceArray<T> x, w, bias;
    DeviceArray<float> shift, shiftWeight, scale, valueScale, product;
    DeviceArray<int32_t> order;
    DeviceArray<T> y, epilogue, s;
    DeviceArray<uint8_t> keep;
    DeviceArray<float> eta, nu;
    LinearArgs decodeArgs;
    MaskArgs maskArgs;
    EpilogueArgs epilogueArgs;
};

//! This machine's GPU; ends the test with code 77 where there is none.
inline DeviceTraits deviceOrSkip() {
    DeviceTraits device{};
    cudaError_t const status = queryDevice(&device);
    if (status == cudaErrorNoDevice || status == cudaErrorInsufficientDriver) {
        std::puts("no GPU: skipped");
        std::exit(77);
    }
    CHECK_CUDA(status);
    return device;
}

}  // namespace nmexport::cuda
