// The kernels on a GPU against a float64 product over an independently sorted mask. Small shapes, so that it also runs
// under compute-sanitizer. Exit code 77 where there is no GPU.
#include "element.cuh"
#include "nm_cuda.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <type_traits>
#include <vector>

using namespace nmexport::cuda;

namespace
{

#define CHECK_CUDA(call)                                                                                               \
    do                                                                                                                 \
    {                                                                                                                  \
        cudaError_t const status = (call);                                                                             \
        if (status != cudaSuccess)                                                                                     \
        {                                                                                                              \
            std::printf("%s: %s\n", #call, cudaGetErrorString(status));                                                \
            std::exit(EXIT_FAILURE);                                                                                   \
        }                                                                                                              \
    } while (false)

//! Device memory that starts as NaN bytes, so that an unwritten element shows.
template <typename T>
struct DeviceArray
{
    explicit DeviceArray(size_t count)
        : count{count}
    {
        CHECK_CUDA(cudaMalloc(&data, std::max<size_t>(count, 1) * sizeof(T)));
        CHECK_CUDA(cudaMemset(data, 0xff, std::max<size_t>(count, 1) * sizeof(T)));
    }

    explicit DeviceArray(std::vector<T> const& host)
        : DeviceArray(host.size())
    {
        CHECK_CUDA(cudaMemcpy(data, host.data(), count * sizeof(T), cudaMemcpyHostToDevice));
    }

    DeviceArray(DeviceArray const&) = delete;
    DeviceArray& operator=(DeviceArray const&) = delete;

    ~DeviceArray()
    {
        cudaFree(data);
    }

    std::vector<T> read() const
    {
        std::vector<T> host(count);
        CHECK_CUDA(cudaMemcpy(host.data(), data, count * sizeof(T), cudaMemcpyDeviceToHost));
        return host;
    }

    size_t count;
    T* data{nullptr};
};

template <typename T>
float widen(T value)
{
    if constexpr (std::is_same_v<T, float>)
    {
        return value;
    }
    else if constexpr (std::is_same_v<T, __half>)
    {
        return __half2float(value);
    }
    else
    {
        return __bfloat162float(value);
    }
}

template <typename T>
T narrow(float value)
{
    if constexpr (std::is_same_v<T, float>)
    {
        return value;
    }
    else if constexpr (std::is_same_v<T, __half>)
    {
        return __float2half(value);
    }
    else
    {
        return __float2bfloat16(value);
    }
}

template <typename T>
constexpr DType kTYPE = std::is_same_v<T, float> ? DType::kFLOAT32
    : std::is_same_v<T, __half>                  ? DType::kFLOAT16
                                                 : DType::kBFLOAT16;

struct Case
{
    int tokens;
    int channels;
    int outputs;
    int n;
    int m;
    bool hasOptions; //!< order, scale, shift, bias, variance correction
    bool hasTies;
};

//! What the contract says, one token: which channels are kept, their z, the exact result.
struct Expected
{
    std::vector<bool> keep;
    std::vector<double> y;
};

template <typename T>
Expected expect(Case const& c, std::vector<T> const& x, std::vector<T> const& w, std::vector<T> const& bias,
    std::vector<float> const& shift, std::vector<float> const& scale, std::vector<int32_t> const& order, int token)
{
    Expected out{std::vector<bool>(c.channels), std::vector<double>(c.outputs)};
    std::vector<float> z(c.channels);
    std::vector<float> score(c.channels);
    for (int k = 0; k < c.channels; ++k)
    {
        z[k] = widen(x[static_cast<size_t>(token) * c.channels + k]) - (c.hasOptions ? shift[k] : 0.0F);
        float volatile const product = std::fabs(z[k]) * (c.hasOptions ? scale[k] : 1.0F);
        score[k] = product;
    }
    for (int first = 0; first < c.channels; first += c.m)
    {
        std::vector<int> group(c.m);
        for (int i = 0; i < c.m; ++i)
        {
            group[i] = c.hasOptions ? order[first + i] : first + i;
        }
        std::stable_sort(group.begin(), group.end(), [&](int a, int b) { return score[a] > score[b]; });
        for (int i = 0; i < c.n; ++i)
        {
            out.keep[group[i]] = true;
        }
    }
    double sums[4] = {};
    for (int k = 0; k < c.channels; ++k)
    {
        double const s = out.keep[k] ? z[k] : 0.0;
        sums[0] += z[k];
        sums[1] += static_cast<double>(z[k]) * z[k];
        sums[2] += s;
        sums[3] += s * s;
        for (int o = 0; s != 0.0 && o < c.outputs; ++o)
        {
            out.y[o] += s * widen(w[static_cast<size_t>(k) * c.outputs + o]);
        }
    }
    double const count = c.channels;
    double const varAll = sums[1] / count - sums[0] * sums[0] / count / count;
    double const varKept = sums[3] / count - sums[2] * sums[2] / count / count;
    double const nu = c.hasOptions ? std::sqrt(varAll / std::max(varKept, 1e-12)) : 1.0;
    for (int o = 0; o < c.outputs; ++o)
    {
        out.y[o] = nu * out.y[o] + (c.hasOptions ? widen(bias[o]) : 0.0);
    }
    return out;
}

template <typename T>
double tolerance(double expected, double scale, int channels)
{
    double const relative = 1e-5 * std::sqrt(static_cast<double>(channels)) * std::max(std::fabs(expected), scale);
    int const bits = std::is_same_v<T, __half> ? 10 : 7;
    double const ulp = std::exp2(std::floor(std::log2(std::max(std::fabs(expected), 6e-5))) - bits);
    return relative + (std::is_same_v<T, float> ? 0.0 : 2 * ulp);
}

template <typename T>
bool runCase(Case const& c, DeviceTraits const& device)
{
    std::mt19937 random(static_cast<unsigned>(c.tokens * 131 + c.channels * 7 + c.outputs + c.n));
    std::normal_distribution<float> normal;
    auto const fill = [&](size_t count, float scale)
    {
        std::vector<T> values(count);
        std::generate(values.begin(), values.end(), [&] { return narrow<T>(normal(random) * scale); });
        return values;
    };
    std::vector<T> x = fill(static_cast<size_t>(c.tokens) * c.channels, 1.0F);
    if (c.hasTies)
    {
        std::generate(x.begin(), x.end(), [&] { return narrow<T>(static_cast<float>(random() % 5) - 2.0F); });
    }
    std::vector<T> const w = fill(static_cast<size_t>(c.channels) * c.outputs, 1.0F / std::sqrt(static_cast<float>(c.channels)));
    std::vector<T> const bias = fill(c.outputs, 1.0F);
    std::vector<float> shift(c.channels);
    std::vector<float> scale(c.channels);
    std::vector<int32_t> order(c.channels);
    std::generate(shift.begin(), shift.end(), [&] { return 0.1F * normal(random); });
    std::generate(scale.begin(), scale.end(), [&] { return 0.5F + std::fabs(normal(random)); });
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), random);

    DeviceArray<T> const dx(x);
    DeviceArray<T> const dw(w);
    DeviceArray<T> const dbias(bias);
    DeviceArray<float> const dshift(shift);
    DeviceArray<float> const dscale(scale);
    DeviceArray<int32_t> const dorder(order);
    DeviceArray<T> const dy(static_cast<size_t>(c.tokens) * c.outputs);
    DeviceArray<T> const ds(x.size());
    DeviceArray<uint8_t> const dkeep(x.size());
    DeviceArray<float> const deta(c.tokens);
    DeviceArray<float> const dnu(c.tokens);

    Selection selection{};
    selection.n = c.n;
    selection.m = c.m;
    if (c.hasOptions)
    {
        selection.scoreScale = dscale.data;
        selection.channelOrder = dorder.data;
        selection.shift = dshift.data;
        selection.shiftLength = c.channels;
        selection.varianceCorrection = true;
    }
    DecodeArgs const decode{kTYPE<T>, c.tokens, c.channels, c.outputs, selection, dx.data, dw.data,
        c.hasOptions ? dbias.data : nullptr, nullptr, dy.data};
    MaskArgs const mask{
        kTYPE<T>, c.tokens, c.channels, selection, dx.data, ds.data, dkeep.data, deta.data, dnu.data};
    CHECK_CUDA(launchDecode(decode, device, nullptr));
    CHECK_CUDA(launchMask(mask, nullptr));
    CHECK_CUDA(cudaDeviceSynchronize());
    std::vector<T> const y = dy.read();
    std::vector<uint8_t> const keep = dkeep.read();
    CHECK_CUDA(launchDecode(decode, device, nullptr));
    CHECK_CUDA(cudaDeviceSynchronize());
    std::vector<T> const again = dy.read();

    bool ok = std::memcmp(y.data(), again.data(), y.size() * sizeof(T)) == 0;
    for (int token = 0; token < c.tokens; ++token)
    {
        Expected const expected = expect(c, x, w, bias, shift, scale, order, token);
        for (int k = 0; k < c.channels; ++k)
        {
            ok = ok && keep[static_cast<size_t>(token) * c.channels + k] == (expected.keep[k] ? 1 : 0);
        }
        double square = 0;
        for (double const value : expected.y)
        {
            square += value * value / c.outputs;
        }
        for (int o = 0; o < c.outputs; ++o)
        {
            double const error = std::fabs(widen(y[static_cast<size_t>(token) * c.outputs + o]) - expected.y[o]);
            ok = ok && error <= tolerance<T>(expected.y[o], std::sqrt(square), c.channels); // false for NaN
        }
    }
    if (!ok)
    {
        std::printf("FAILED tokens %d K %d O %d %d:%d options %d ties %d type %d\n", c.tokens, c.channels, c.outputs,
            c.n, c.m, c.hasOptions, c.hasTies, static_cast<int>(kTYPE<T>));
    }
    return ok;
}

} // namespace

int main()
{
    DeviceTraits device{};
    if (queryDevice(&device) != cudaSuccess)
    {
        std::puts("no GPU: skipped");
        return 77;
    }
    int passed = 0;
    int failed = 0;
    std::vector<Case> cases;
    for (int tokens = 1; tokens <= kMAX_DECODE_TOKENS; ++tokens)
    {
        for (bool const hasOptions : {false, true})
        {
            cases.push_back({tokens, 512, 256, 8, 16, hasOptions, false});
            cases.push_back({tokens, 192, 72, 8, 16, hasOptions, true});
            cases.push_back({tokens, 96, 40, 2, 4, hasOptions, true});
            cases.push_back({tokens, 128, 40, 16, 16, hasOptions, false});
            cases.push_back({tokens, 192, 33, 3, 12, hasOptions, false});
            cases.push_back({tokens, 256, 24, 20, 64, hasOptions, true});
        }
    }
    for (Case const& c : cases)
    {
        for (bool const ok : {runCase<float>(c, device), runCase<__half>(c, device), runCase<__nv_bfloat16>(c, device)})
        {
            ++(ok ? passed : failed);
        }
    }
    std::printf("%d passed, %d failed\n", passed, failed);
    return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
