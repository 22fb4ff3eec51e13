// Rows that are pruned where they are made, and the linears that take them: the norm and the gated
// activation against float64, what they keep against the contract's selection of the row that the
// same kernel makes without pruning. Exit code 77 where there is no GPU.
#include "between.h"
#include "reference.cuh"

namespace nmexport::cuda {
namespace {

constexpr float kEPSILON = 1e-5F;

double gated(double gate, double up) {
    return gate / (1 + std::exp(-gate)) * up;
}

//! Values of T, a few of them far from the others.
template <typename T>
std::vector<T> values(size_t count, unsigned seed) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    std::vector<T> made(count);
    std::generate(made.begin(), made.end(), [&] {
        return narrow<T>(random() % 64 == 0 ? 8 * normal(random) : normal(random));
    });
    return made;
}

//! A producer of rows [tokens, K]: a norm of a sum, or a gated activation of a packed row.
template <typename T>
struct Producer {
    Producer(Case const& c, bool isNorm)
        : c{c},
          isNorm{isNorm},
          count{static_cast<size_t>(c.tokens) * c.channels},
          first{values<T>(isNorm ? count : 2 * count, 1)},
          second{values<T>(count, 2)},
          weight{values<T>(c.channels, 3)},
          x(first),
          skip(second),
          scale(weight),
          sum(count) {}

    cudaError_t launch(T* y, Selection const* selection, DeviceTraits const& device) const {
        Selection const chosen = selection == nullptr ? Selection{} : *selection;
        if (isNorm) {
            NormArgs args{kTYPE<T>,  c.tokens,   c.channels, kEPSILON, x.data,
                          skip.data, scale.data, y,          sum.data, selection != nullptr,
                          chosen};
            return launchNorm(args, device, nullptr);
        }
        GatedSiluArgs args{kTYPE<T>,   c.tokens,
                           c.channels, 2 * c.channels,
                           x.data,     x.data + c.channels,
                           y,          selection != nullptr,
                           chosen};
        return launchGatedSilu(args, device, nullptr);
    }

    //! The row of one token, in float64 but for the roundings that the definition has.
    std::vector<double> expected(int token) const {
        std::vector<double> row(c.channels);
        if (!isNorm) {
            T const* const packed = first.data() + static_cast<size_t>(token) * 2 * c.channels;
            for (int k = 0; k < c.channels; ++k) {
                row[k] = gated(widen(packed[k]), widen(packed[c.channels + k]));
            }
            return row;
        }
        double squares = 0;
        for (int k = 0; k < c.channels; ++k) {
            size_t const at = static_cast<size_t>(token) * c.channels + k;
            row[k] = widen(narrow<T>(widen(first[at]) + widen(second[at])));
            squares += row[k] * row[k];
        }
        double const factor = 1 / std::sqrt(squares / c.channels + kEPSILON);
        for (int k = 0; k < c.channels; ++k) {
            row[k] = widen(narrow<T>(static_cast<float>(row[k] * factor))) * widen(weight[k]);
        }
        return row;
    }

    Case c;
    bool isNorm;
    size_t count;
    std::vector<T> first, second, weight;
    DeviceArray<T> x, skip, scale, sum;
};

template <typename T>
std::vector<T> run(Producer<T> const& producer, Selection const* selection,
                   DeviceTraits const& device) {
    DeviceArray<T> y(producer.count);
    CHECK_CUDA(producer.launch(y.data, selection, device));
    CHECK_CUDA(cudaDeviceSynchronize());
    return y.read();
}

//! y of a linear on the pruned rows, alone and all together: the same bits where kernels that read
//! kept rows alone take them.
template <typename T>
bool checkLinear(Case const& c, Launches<T>& on, std::vector<T> const& s,
                 std::vector<Expected> const& expected, DeviceTraits const& device) {
    DeviceArray<T> const rows(s);
    LinearArgs args = on.decodeArgs;
    args.selection = Selection{};
    args.selection.n = args.selection.m;
    args.isPruned = true;
    args.x = rows.data;
    auto const together = [&](int tokens) {
        args.tokens = tokens;
        CHECK_CUDA(cudaMemset(on.y.data, 0xff, on.y.count * sizeof(T)));
        CHECK_CUDA(launchDecode(args, device, nullptr));
        CHECK_CUDA(cudaDeviceSynchronize());
        return on.y.read();
    };
    int const tokens = std::min<int>(c.tokens, kMAX_PRUNED_TOKENS);
    std::vector<T> const all = together(tokens);
    std::vector<T> const alone = together(1);
    bool ok = std::memcmp(all.data(), alone.data(), c.outputs * sizeof(T)) == 0;
    double const relative = 1e-3;  // s is rounded to T once more than the contract's
    for (int token = 0; token < tokens; ++token) {
        ok = ok && isClose(all.data() + static_cast<size_t>(token) * c.outputs, expected[token].y,
                           std::is_same_v<T, __half> ? relative : 8 * relative);
    }
    return ok;
}

//! s of rows that another kernel has made, pruned in the chain.
template <typename T>
bool checkPrune(Case const& c, Launches<T>& on, std::vector<Expected> const& expected,
                DeviceTraits const& device) {
    MaskArgs args = on.maskArgs;
    args.keep = nullptr;
    if (!canPruneInChain(args)) {
        return c.tokens > 16 && (!c.hasOrder() || c.channels > 8192);
    }
    CHECK_CUDA(launchPrune(args, device, nullptr));
    CHECK_CUDA(cudaDeviceSynchronize());
    std::vector<T> const s = on.s.read();
    bool ok = true;
    for (int token = 0; token < c.tokens; ++token) {
        for (int k = 0; k < c.channels; ++k) {
            ok = ok && widen(s[static_cast<size_t>(token) * c.channels + k]) ==
                           widen(narrow<T>(expected[token].s[k]));
        }
    }
    return ok;
}

template <typename T>
bool runCase(Case const& c, bool isNorm, DeviceTraits const& device) {
    Producer<T> const producer(c, isNorm);
    Problem<T> problem = problemOf<T>(c);
    problem.x = run<T>(producer, nullptr, device);
    bool ok = true;
    std::vector<Expected> expected;
    for (int token = 0; token < c.tokens; ++token) {
        ok = ok && isClose(problem.x.data() + static_cast<size_t>(token) * c.channels,
                           producer.expected(token), 1e-5);
        expected.push_back(expect(c, problem, token));
    }
    Launches<T> on(c, problem);
    std::vector<T> const s = run<T>(producer, &on.decodeArgs.selection, device);
    for (int token = 0; token < c.tokens; ++token) {
        for (int k = 0; k < c.channels; ++k) {
            ok = ok && widen(s[static_cast<size_t>(token) * c.channels + k]) ==
                           widen(narrow<T>(expected[token].s[k]));
        }
    }
    ok = checkLinear(c, on, s, expected, device) && ok;
    ok = checkPrune(c, on, expected, device) && ok;
    if (!ok) {
        std::printf("FAILED %s tokens %d K %d O %d %d:%d options %d type %d\n",
                    isNorm ? "norm" : "gated", c.tokens, c.channels, c.outputs, c.n, c.m,
                    static_cast<int>(c.options), static_cast<int>(kTYPE<T>));
    }
    return ok;
}

}  // namespace
}  // namespace nmexport::cuda

int main() {
    using namespace nmexport::cuda;
    DeviceTraits const device = deviceOrSkip();
    int passed = 0;
    int failed = 0;
    auto const check = [&](Case const& c) {
        for (bool const isNorm : {true, false}) {
            for (bool const ok :
                 {runCase<__half>(c, isNorm, device), runCase<__nv_bfloat16>(c, isNorm, device)}) {
                ++(ok ? passed : failed);
            }
        }
    };
    // Nothing is dropped: rows are gathered at most.
    for (Options const options : {Options::kNONE, Options::kORDER}) {
        for (int const tokens : {1, 20, 140}) {
            check({tokens, 176, 40, 16, 16, options, false});
            check({tokens, 4096, 8, 16, 16, options, false});
        }
        check({140, 14336, 8, 16, 16, options, false});
    }
    for (Options const options :
         {Options::kNONE, Options::kORDER, Options::kSCALAR, Options::kSCALED}) {
        for (int const tokens : {1, 2, 3, 20, 140}) {
            check({tokens, 512, 256, 8, 16, options, false});
            check({tokens, 176, 40, 8, 16, options, false});
            check({tokens, 4096, 72, 8, 16, options, false});
            check({tokens, 4608, 33, 5, 16, options, false});
            check({tokens, 14336, 64, 8, 16, options, false});
        }
        // Blocks take some of so many rows each, and the last takes fewer.
        for (int const tokens : {301, 603}) {
            check({tokens, 176, 40, 8, 16, options, false});
            check({tokens, 176, 40, 11, 16, options, true});
            check({tokens, 4096, 8, 8, 16, options, false});
        }
    }
    std::printf("%d passed, %d failed\n", passed, failed);
    return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
