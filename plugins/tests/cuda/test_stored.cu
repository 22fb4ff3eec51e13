// Linears whose weights are integers or 8-bit floats, against float64 sums over an independently
// sorted mask: every storage, scale group and zero point, few tokens on stored rows and many on
// widened ones. Small shapes, so that it also runs under compute-sanitizer. Exit code 77 where
// there is no GPU.
#include "linear_executor.h"
#include "reference.cuh"
#include "stored.h"

#include <cuda_fp8.h>

namespace nmexport::cuda {
namespace {

enum class Zero { kNONE, kSTORED, kFLOAT };

struct Storing {
    WeightType type;
    int groupSize;  //!< channels; 0: one group
    Zero zero;
    bool scaleIsT;

    int groups(int channels) const { return groupSize == 0 ? 1 : channels / groupSize; }
};

//! A random value of a storage: its bits, and what they mean.
struct StoredValue {
    uint8_t bits;
    double value;
};

//! `isSmall`: as a zero point is, so that sums are not of differences alone.
StoredValue randomValue(WeightType type, std::mt19937& random, bool isSmall) {
    uint8_t bits = static_cast<uint8_t>(random());
    if (isSmall && type == WeightType::kINT8) {
        bits = static_cast<uint8_t>((bits & 15) - 8);
    } else if (isSmall && type == WeightType::kFLOAT8) {
        bits &= 0xbf;  // below 2
    }
    switch (type) {
        case WeightType::kINT8:
            return {bits, static_cast<double>(static_cast<int8_t>(bits))};
        case WeightType::kINT4:
            return {static_cast<uint8_t>(bits & 15), static_cast<double>(((bits & 15) ^ 8) - 8)};
        case WeightType::kUINT4:
            return {static_cast<uint8_t>(bits & 15), static_cast<double>(bits & 15)};
        default: {
            uint8_t const number = (bits & 127) == 127 ? 0 : bits;  // no NaN
            __half_raw const half = __nv_cvt_fp8_to_halfraw(number, __NV_E4M3);
            return {number, static_cast<double>(__half2float(__half(half)))};
        }
    }
}

//! An array as it is stored, and its values.
struct StoredArray {
    StoredArray(WeightType type, size_t count, std::mt19937& random, bool isSmall) : values(count) {
        bool const isNarrow = type == WeightType::kINT4 || type == WeightType::kUINT4;
        bytes.resize(isNarrow ? count / 2 : count);
        for (size_t i = 0; i < count; ++i) {
            StoredValue const one = randomValue(type, random, isSmall);
            values[i] = one.value;
            if (isNarrow) {
                bytes[i / 2] |= static_cast<uint8_t>(one.bits << (i % 2 == 0 ? 0 : 4));
            } else {
                bytes[i] = one.bits;
            }
        }
    }

    std::vector<double> values;
    std::vector<uint8_t> bytes;
};

//! W [K, O] with its scales and zero points [G, O].
template <typename T>
struct StoredProblem {
    StoredProblem(Case const& c, Storing const& s)
        : random(static_cast<unsigned>(c.channels + 3 * c.outputs + s.groupSize)),
          weights(s.type, static_cast<size_t>(c.channels) * c.outputs, random, false),
          zeros(s.type, static_cast<size_t>(s.groups(c.channels)) * c.outputs, random, true) {
        std::uniform_real_distribution<float> uniform(0.5F, 1.5F);
        for (double& zero : zeros.values) {
            scale.push_back(uniform(random) / 64);
            scaleOfT.push_back(narrow<T>(scale.back()));
            scale.back() = s.scaleIsT ? widen(scaleOfT.back()) : scale.back();
            zeroFloat.push_back(8 * uniform(random));
            zero = s.zero == Zero::kNONE ? 0.0 : (s.zero == Zero::kFLOAT ? zeroFloat.back() : zero);
        }
    }

    double weight(Case const& c, Storing const& s, int k, int o) const {
        int const group = k / (c.channels / s.groups(c.channels));
        size_t const place = static_cast<size_t>(group) * c.outputs + o;
        double const stored = weights.values[static_cast<size_t>(k) * c.outputs + o];
        return (stored - zeros.values[place]) * scale[place];
    }

    std::mt19937 random;
    StoredArray weights;
    StoredArray zeros;
    std::vector<float> scale, zeroFloat;
    std::vector<T> scaleOfT;
};

template <typename T>
struct StoredOnDevice {
    explicit StoredOnDevice(StoredProblem<T> const& p)
        : w(p.weights.bytes),
          zeros(p.zeros.bytes),
          scale(p.scale),
          zeroFloat(p.zeroFloat),
          scaleOfT(p.scaleOfT) {}

    StoredWeights describe(Case const& c, Storing const& s) const {
        StoredWeights stored;
        stored.type = s.type;
        stored.groups = s.groups(c.channels);
        stored.scaleIsT = s.scaleIsT;
        stored.scale = s.scaleIsT ? static_cast<void const*>(scaleOfT.data) : scale.data;
        stored.zeroPointIsFloat = s.zero == Zero::kFLOAT;
        if (s.zero != Zero::kNONE) {
            stored.zeroPoint =
                stored.zeroPointIsFloat ? static_cast<void const*>(zeroFloat.data) : zeros.data;
        }
        return stored;
    }

    DeviceArray<uint8_t> w, zeros;
    DeviceArray<float> scale, zeroFloat;
    DeviceArray<T> scaleOfT;
};

//! y [tokens, O] by the contract, with the weights that are meant. s is T's, whose bits
//! test_kernels.cu checks: values less one shift are rounded by the same amount, which does not
//! average out over weights whose mean is not zero.
template <typename T>
std::vector<std::vector<double>> expectedOf(Case const& c, Storing const& s, Problem<T> const& p,
                                            StoredProblem<T> const& stored) {
    std::vector<double> weights(static_cast<size_t>(c.channels) * c.outputs);
    for (int k = 0; k < c.channels; ++k) {
        for (int o = 0; o < c.outputs; ++o) {
            weights[static_cast<size_t>(k) * c.outputs + o] = stored.weight(c, s, k, o);
        }
    }
    std::vector<std::vector<double>> all;
    for (int token = 0; token < c.tokens; ++token) {
        Case selection = c;
        selection.outputs = 0;  // of the other reference its selection alone is wanted
        Expected const e = expect(selection, p, token);
        std::vector<double> y(c.outputs, 0.0);
        for (int k = 0; k < c.channels; ++k) {
            double const s = widen(narrow<T>(e.s[k]));
            for (int o = 0; s != 0.0 && o < c.outputs; ++o) {
                y[o] += s * weights[static_cast<size_t>(k) * c.outputs + o];
            }
        }
        for (int o = 0; o < c.outputs; ++o) {
            double const eta = c.is(Options::kDYNAMIC) ? e.eta * p.shiftWeight[o] : 0.0;
            y[o] = e.nu * y[o] + eta + (c.is(Options::kNONE) ? 0.0 : widen(p.bias[o]));
        }
        all.push_back(y);
    }
    return all;
}

//! What a path may be off by, relative to the size of y: its float32 sums, and four times a half
//! unit in the last place for weights that are rounded to T, each for itself.
template <typename T>
double allowedOf(Case const& c, bool isRounded) {
    double const sums = 1e-5 * std::sqrt(static_cast<double>(c.channels));
    double const unit = std::is_same_v<T, __half> ? 2e-3 : 1.6e-2;
    double const rounding = std::is_same_v<T, float> ? 0.0 : unit;
    return sums + (isRounded ? rounding : 0.0);
}

//! y of two runs, which have the same bits; `run` enqueues one.
template <typename T, typename Run>
bool runTwice(DeviceArray<T> const& y, std::vector<T>* result, Run const& run) {
    std::vector<T> runs[2];
    for (std::vector<T>& one : runs) {
        CHECK_CUDA(cudaMemset(y.data, 0xff, y.count * sizeof(T)));
        run();
        CHECK_CUDA(cudaDeviceSynchronize());
        one = y.read();
    }
    *result = runs[0];
    return std::memcmp(runs[0].data(), runs[1].data(), runs[0].size() * sizeof(T)) == 0;
}

//! Whether y is within what is allowed; says by how much it is off where it is not.
template <typename T>
bool isRight(Case const& c, std::vector<T> const& y,
             std::vector<std::vector<double>> const& expected, double allowed) {
    for (int token = 0; token < c.tokens; ++token) {
        T const* const row = y.data() + static_cast<size_t>(token) * c.outputs;
        if (isClose(row, expected[token], allowed)) {
            continue;
        }
        double square = 0;
        double worst = 0;
        for (int o = 0; o < c.outputs; ++o) {
            square += expected[token][o] * expected[token][o] / c.outputs;
            worst = std::max(worst, std::fabs(widen(row[o]) - expected[token][o]));
        }
        std::printf("token %d and perhaps later ones: off by %g of its size, %g allowed\n", token,
                    worst / std::sqrt(square), allowed);
        return false;
    }
    return true;
}

//! A problem on the device, with the arguments of its linear.
template <typename T>
struct Bench {
    Bench(Case const& c, Storing const& s)
        : problem(problemOf<T>(c)), storedProblem(c, s), on(c, problem), stored(storedProblem) {
        args = on.decodeArgs;
        args.w = stored.w.data;
        args.stored = stored.describe(c, s);
    }

    Problem<T> problem;
    StoredProblem<T> storedProblem;
    Launches<T> on;
    StoredOnDevice<T> stored;
    LinearArgs args;
};

template <typename T>
bool runPath(Bench<T>& bench, LinearPath path, DeviceTraits const& device, std::vector<T>* y) {
    DeviceArray<uint8_t> const workspace(workspaceBytes(workOf(bench.args), device, path));
    LinearExecutor executor;
    return runTwice(bench.on.y, y,
                    [&] { executor.run(bench.args, device, path, workspace.data, nullptr); });
}

//! The executor on this device, on one without clusters, and by way of widened weights.
template <typename T>
bool checkExecutor(Case const& c, Storing const& s, DeviceTraits const& device) {
    Bench<T> bench(c, s);
    std::vector<std::vector<double>> const expected =
        expectedOf(c, s, bench.problem, bench.storedProblem);
    DeviceTraits old = device;
    old.computeCapability = std::min(device.computeCapability, 80);
    bool const isStored = hasStoredRows(bench.args) && c.tokens <= kMAX_STORED_TOKENS;
    bool ok = true;
    std::vector<T> y;
    for (DeviceTraits const& like : {device, old}) {
        ok = runPath(bench, LinearPath::kFASTER, like, &y) && ok;
        ok = isRight(c, y, expected, allowedOf<T>(c, !isStored)) && ok;
    }
    ok = runPath(bench, LinearPath::kPRODUCT, device, &y) && ok;
    ok = isRight(c, y, expected, allowedOf<T>(c, true)) && ok;
    if (!ok) {
        std::printf(
            "FAILED tokens %d K %d O %d %d:%d options %d type %d storage %d group %d zero %d "
            "scale of T %d\n",
            c.tokens, c.channels, c.outputs, c.n, c.m, static_cast<int>(c.options),
            static_cast<int>(kTYPE<T>), static_cast<int>(s.type), s.groupSize,
            static_cast<int>(s.zero), s.scaleIsT);
    }
    return ok;
}

//! Every compiled shape in clusters of all sizes, on a dense x.
template <typename T>
bool checkPlans(Storing const& s, int tokens, DeviceTraits const& device) {
    Case const c{tokens, 1536, 800, 16, 16, Options::kNONE, false};
    Bench<T> bench(c, s);
    std::vector<std::vector<double>> const expected =
        expectedOf(c, s, bench.problem, bench.storedProblem);
    bool ok = true;
    for (StoredPlanShape const& shape : kSTORED_SHAPES) {
        if (!hasShape(s.type, shape)) {
            continue;
        }
        for (int const cluster : {1, 2, 3, 8}) {
            DecodePlan plan = storedPlan(bench.args, device);
            plan.warps = shape.warps;
            plan.unroll = shape.unroll;
            plan.cluster = cluster;
            plan.allowsNextLate = cluster == 2 ? 1 : 0;
            std::vector<T> y;
            bool const isSame = runTwice(bench.on.y, &y, [&] {
                CHECK_CUDA(launchStoredWithPlan(bench.args, {}, plan, device, nullptr));
            });
            bool const isFine = isSame && isRight(c, y, expected, allowedOf<T>(c, false));
            if (!isFine) {
                std::printf(
                    "FAILED plan %d x %d cluster %d tokens %d type %d storage %d group %d\n",
                    shape.warps, shape.unroll, cluster, tokens, static_cast<int>(kTYPE<T>),
                    static_cast<int>(s.type), s.groupSize);
            }
            ok = ok && isFine;
        }
    }
    return ok;
}

//! A NaN of one token shows in all outputs of that token and in no other's.
template <typename T>
bool checkNan(Storing const& s, int tokens, DeviceTraits const& device) {
    Case const c{tokens, 512, 256, 8, 16, Options::kNONE, false};
    Bench<T> bench(c, s);
    std::vector<T> x = bench.problem.x;
    x[static_cast<size_t>(tokens - 1) * c.channels + 37] = narrow<T>(NAN);
    DeviceArray<T> const poisoned(x);
    bench.args.x = poisoned.data;
    std::vector<T> y;
    bool ok = runPath(bench, LinearPath::kFASTER, device, &y);
    for (size_t i = 0; i < y.size(); ++i) {
        bool const isLast = i >= static_cast<size_t>(tokens - 1) * c.outputs;
        ok = ok && std::isnan(widen(y[i])) == isLast;
    }
    return ok;
}

struct Count {
    int passed{0};
    int failed{0};

    void add(bool ok) { ++(ok ? passed : failed); }
};

std::vector<Storing> storings() {
    std::vector<Storing> all;
    for (WeightType const type :
         {WeightType::kINT8, WeightType::kINT4, WeightType::kUINT4, WeightType::kFLOAT8}) {
        all.push_back({type, 0, Zero::kNONE, false});
        all.push_back({type, 0, Zero::kSTORED, true});
        all.push_back({type, 16, Zero::kNONE, true});
        all.push_back({type, 32, Zero::kSTORED, false});
        all.push_back({type, 128, Zero::kSTORED, true});
        if (type != WeightType::kFLOAT8) {
            all.push_back({type, 64, Zero::kFLOAT, true});
        }
    }
    return all;
}

//! One type of T a case, in turns: the two share all but the conversions.
template <typename Check>
void checkInTurns(Count* count, Check const& check) {
    bool const isHalf = (count->passed + count->failed) % 2 == 0;
    count->add(isHalf ? check(__half{}) : check(__nv_bfloat16{}));
}

void checkStoring(Storing const& s, DeviceTraits const& device, Count* count) {
    for (int const tokens : {1, 2, 5, 40}) {
        std::vector<Case> cases = {{tokens, 512, 320, 8, 16, Options::kNONE, false},
                                   {tokens, 512, 96, 16, 16, Options::kSCALAR, false},
                                   {tokens, 512, 96, 10, 16, Options::kORDER, true},
                                   {tokens, 256, 64, 4, 8, Options::kDYNAMIC, false},
                                   {tokens, 384, 42, 8, 16, Options::kSTATIC, false}};
        if (tokens != 40) {
            cases.push_back({tokens, 4096, 64, 8, 16, Options::kNONE, false});
        }
        for (Case const& c : cases) {
            checkInTurns(count,
                         [&](auto zero) { return checkExecutor<decltype(zero)>(c, s, device); });
        }
        if (tokens == 1) {
            count->add(checkExecutor<float>(cases[0], s, device));
        } else if (tokens == 2 || tokens == 5) {
            checkInTurns(count,
                         [&](auto zero) { return checkNan<decltype(zero)>(s, tokens, device); });
        }
    }
    for (int const tokens : {1, 11}) {
        checkInTurns(count,
                     [&](auto zero) { return checkPlans<decltype(zero)>(s, tokens, device); });
    }
}

}  // namespace
}  // namespace nmexport::cuda

int main() {
    using namespace nmexport::cuda;
    DeviceTraits const device = deviceOrSkip();
    Count count;
    for (Storing const& s : storings()) {
        checkStoring(s, device, &count);
    }
    std::printf("%d passed, %d failed\n", count.passed, count.failed);
    return count.failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
