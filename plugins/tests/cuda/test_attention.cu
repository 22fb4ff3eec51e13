// The attention kernel on a GPU against float64 sums on the host. Exit code 77 where there is no
// GPU that it runs on. With --time it tells microseconds a launch as well.
#include "attention.h"
#include "device_array.cuh"
#include "element.cuh"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

using namespace nmexport::cuda;

namespace {

template <typename T>
constexpr bool kIS_HALF = std::is_same_v<T, __half>;

template <typename T>
double widen(T value) {
    if constexpr (kIS_HALF<T>) {
        return __half2float(value);
    } else {
        return __bfloat162float(value);
    }
}

template <typename T>
T narrow(double value) {
    if constexpr (kIS_HALF<T>) {
        return __float2half(static_cast<float>(value));
    } else {
        return __float2bfloat16(static_cast<float>(value));
    }
}

//! Half of the distance from 1 to the next number.
template <typename T>
constexpr double kEPSILON = kIS_HALF<T> ? 0x1p-11 : 0x1p-8;

template <typename T>
bool sameBits(T a, T b) {
    return std::memcmp(&a, &b, sizeof(T)) == 0;
}

struct Case {
    std::vector<int> lengths;  //!< of each sequence, the new token included
    int headSize;
    int group;
    int kvHeads;
    int window;
    int rotary;
    bool isCounting;  //!< equal weights, and values that tell which positions were added

    int batch() const { return static_cast<int>(lengths.size()); }
    int heads() const { return group * kvHeads; }
    int longest() const { return *std::max_element(lengths.begin(), lengths.end()); }
    int width() const { return (heads() + 2 * kvHeads) * headSize; }
};

//! What a case is made of, on the host.
template <typename T>
struct Problem {
    std::vector<T> packed;  //!< [batch, (H + 2 * H_kv) * D]
    std::vector<T> keys;    //!< [batch, H_kv, longest, D], the new token's rows not there yet
    std::vector<T> values;
    std::vector<T> cosines;  //!< [longest, R / 2]
    std::vector<T> sines;
};

template <typename T>
Problem<T> problemOf(Case const& c) {
    std::mt19937 random(7);
    std::normal_distribution<double> normal;
    auto const drawn = [&](size_t count, double factor) {
        std::vector<T> values(count);
        for (T& value : values) {
            value = narrow<T>(factor * normal(random));
        }
        return values;
    };
    Problem<T> p;
    size_t const rows = static_cast<size_t>(c.batch()) * c.kvHeads * c.longest();
    p.packed = drawn(static_cast<size_t>(c.batch()) * c.width(), 2.0);
    p.keys = drawn(rows * c.headSize, 1.0);
    p.values = drawn(rows * c.headSize, 1.0);
    for (int position = 0; position < c.longest(); ++position) {
        for (int i = 0; i < c.rotary / 2; ++i) {
            double const angle = position * std::pow(10000.0, -2.0 * i / c.rotary);
            p.cosines.push_back(narrow<T>(std::cos(angle)));
            p.sines.push_back(narrow<T>(std::sin(angle)));
        }
    }
    auto const marked = [&](size_t position, int element) {
        return narrow<T>(static_cast<int>(position) % c.headSize == element ? 1.0 : 0.0);
    };
    if (c.isCounting) {
        for (size_t i = 0; i < p.values.size(); ++i) {
            p.values[i] = marked(i / c.headSize % c.longest(), static_cast<int>(i % c.headSize));
        }
        for (size_t i = 0; i < p.packed.size(); ++i) {
            int const column = static_cast<int>(i % c.width());
            int const length = c.lengths[i / c.width()];
            bool const isValue = column >= (c.heads() + c.kvHeads) * c.headSize;
            p.packed[i] = isValue ? marked(length - 1, column % c.headSize) : narrow<T>(0.0);
        }
    }
    return p;
}

//! A head of queries or keys, turned by its position and rounded.
template <typename T>
std::vector<T> turned(Case const& c, Problem<T> const& p, T const* head, int position) {
    std::vector<T> result(head, head + c.headSize);
    int const half = c.rotary / 2;
    for (int i = 0; i < half; ++i) {
        double const cosine = widen(p.cosines[static_cast<size_t>(position) * half + i]);
        double const sine = widen(p.sines[static_cast<size_t>(position) * half + i]);
        double const a = widen(head[i]);
        double const b = widen(head[i + half]);
        result[i] = narrow<T>(a * cosine - b * sine);
        result[i + half] = narrow<T>(b * cosine + a * sine);
    }
    return result;
}

struct Expected {
    std::vector<double> y;
    std::vector<double> slack;  //!< sums of |weight * value|
};

template <typename T>
Expected expect(Case const& c, Problem<T> const& p, int sequence, int head) {
    int const D = c.headSize;
    int const last = c.lengths[sequence] - 1;
    int const first = c.window > 0 ? std::max(0, last + 1 - c.window) : 0;
    int const kvHead = head / c.group;
    T const* const row = p.packed.data() + static_cast<size_t>(sequence) * c.width();
    std::vector<T> const q = turned(c, p, row + head * D, last);
    std::vector<T> const newKey = turned(c, p, row + (c.heads() + kvHead) * D, last);
    T const* const newValue = row + (c.heads() + c.kvHeads + kvHead) * D;
    size_t const cache = (static_cast<size_t>(sequence) * c.kvHeads + kvHead) * c.longest();
    auto const rowOf = [&](std::vector<T> const& rows, int position) {
        return rows.data() + (cache + position) * D;
    };
    std::vector<double> weights;
    for (int position = first; position <= last; ++position) {
        T const* const key = position == last ? newKey.data() : rowOf(p.keys, position);
        double score = 0;
        for (int d = 0; d < D; ++d) {
            score += widen(q[d]) * widen(key[d]);
        }
        weights.push_back(score / std::sqrt(D));
    }
    double const highest = *std::max_element(weights.begin(), weights.end());
    double total = 0;
    for (double& weight : weights) {
        total += weight = std::exp(weight - highest);
    }
    Expected expected{std::vector<double>(D), std::vector<double>(D)};
    for (int position = first; position <= last; ++position) {
        T const* const value = position == last ? newValue : rowOf(p.values, position);
        for (int d = 0; d < D; ++d) {
            double const part = weights[position - first] / total * widen(value[d]);
            expected.y[d] += part;
            expected.slack[d] += std::abs(part);
        }
    }
    return expected;
}

//! Some of a case's sequences on the device, in caches of their own.
template <typename T>
struct OnDevice {
    OnDevice(Case const& c, Problem<T> const& p, int from, int count, int capacity)
        : batch{count},
          capacity{capacity},
          packed(
              std::vector<T>(p.packed.begin() + static_cast<ptrdiff_t>(from) * c.width(),
                             p.packed.begin() + static_cast<ptrdiff_t>(from + count) * c.width())),
          keys(caches(c, p.keys, from)),
          values(caches(c, p.values, from)),
          cosines(padded(p.cosines)),
          sines(padded(p.sines)),
          last(lastPositions(c, from)),
          y(static_cast<size_t>(count) * c.heads() * c.headSize) {}

    //! Rows from the new token's on are NaN: what they hold must not matter.
    std::vector<T> caches(Case const& c, std::vector<T> const& rows, int from) const {
        std::vector<T> all(static_cast<size_t>(batch) * c.kvHeads * capacity * c.headSize);
        std::memset(static_cast<void*>(all.data()), 0xff, all.size() * sizeof(T));
        for (int head = 0; head < batch * c.kvHeads; ++head) {
            int const old = c.lengths[from + head / c.kvHeads] - 1;
            size_t const source =
                (static_cast<size_t>(from) * c.kvHeads + head) * c.longest() * c.headSize;
            std::copy_n(rows.begin() + static_cast<ptrdiff_t>(source), old * c.headSize,
                        all.begin() + static_cast<ptrdiff_t>(head) * capacity * c.headSize);
        }
        return all;
    }

    static std::vector<T> padded(std::vector<T> table) {
        table.resize(std::max<size_t>(table.size(), 8));
        return table;
    }

    std::vector<int32_t> lastPositions(Case const& c, int from) const {
        std::vector<int32_t> positions;
        for (int i = 0; i < batch; ++i) {
            positions.push_back(c.lengths[from + i] - 1);
        }
        return positions;
    }

    AttentionArgs args(Case const& c) const {
        AttentionArgs a;
        a.type = kIS_HALF<T> ? DType::kFLOAT16 : DType::kBFLOAT16;
        a.batch = batch;
        a.heads = c.heads();
        a.kvHeads = c.kvHeads;
        a.headSize = c.headSize;
        a.capacity = capacity;
        a.window = c.window;
        a.rotary = c.rotary;
        a.positions = c.longest();
        a.scale = static_cast<float>(1.0 / std::sqrt(c.headSize));
        a.queryStride = a.keyStride = c.width();
        a.q = packed.data;
        a.k = packed.data + static_cast<size_t>(c.heads()) * c.headSize;
        a.v = packed.data + static_cast<size_t>(c.heads() + c.kvHeads) * c.headSize;
        a.keys = keys.data;
        a.values = values.data;
        a.lastPositions = last.data;
        a.cosines = cosines.data;
        a.sines = sines.data;
        a.y = y.data;
        return a;
    }

    std::vector<T> run(Case const& c, DeviceTraits const& device, AttentionPlan plan = {}) const {
        CHECK_CUDA(cudaMemset(y.data, 0xff, y.count * sizeof(T)));
        CHECK_CUDA(launchAttentionWithPlan(args(c), plan, device, nullptr));
        CHECK_CUDA(cudaDeviceSynchronize());
        return y.read();
    }

    int batch;
    int capacity;
    DeviceArray<T> packed;
    DeviceArray<T> keys;
    DeviceArray<T> values;
    DeviceArray<T> cosines;
    DeviceArray<T> sines;
    DeviceArray<int32_t> last;
    DeviceArray<T> y;
};

template <typename T>
bool sameBits(char const* what, std::vector<T> const& got, std::vector<T> const& wanted) {
    for (size_t i = 0; i < wanted.size(); ++i) {
        if (!sameBits(got[i], wanted[i])) {
            std::printf("%s: element %zu is %g, not %g\n", what, i, widen(got[i]),
                        widen(wanted[i]));
            return false;
        }
    }
    return true;
}

template <typename T>
bool checkResult(Case const& c, Problem<T> const& p, std::vector<T> const& y, double& worst) {
    for (int sequence = 0; sequence < c.batch(); ++sequence) {
        for (int head = 0; head < c.heads(); ++head) {
            Expected const expected = expect(c, p, sequence, head);
            for (int d = 0; d < c.headSize; ++d) {
                size_t const at =
                    (static_cast<size_t>(sequence) * c.heads() + head) * c.headSize + d;
                double const got = widen(y[at]);
                // One rounding of y, one of each weight, and of queries and keys where the turn
                // was rounded to the neighbour. Counts are exact until y.
                double const allowed =
                    kEPSILON<T> * (1.01 * std::abs(expected.y[d]) +
                                   (c.isCounting ? 0.0 : 5.0 * expected.slack[d])) +
                    1e-7;
                double const error = std::abs(got - expected.y[d]);
                worst = std::max(worst, error / allowed);
                if (!(error <= allowed)) {
                    std::printf("y[%d, %d, %d] is %g, not %g +- %g\n", sequence, head, d, got,
                                expected.y[d], allowed);
                    return false;
                }
            }
        }
    }
    return true;
}

//! The new token's rows are in the caches, and nothing else has changed.
template <typename T>
bool checkCaches(Case const& c, Problem<T> const& p, OnDevice<T> const& on) {
    std::vector<T> keys = on.caches(c, p.keys, 0);
    std::vector<T> values = on.caches(c, p.values, 0);
    std::vector<T> const gotKeys = on.keys.read();
    int const D = c.headSize;
    for (int head = 0; head < c.batch() * c.kvHeads; ++head) {
        int const sequence = head / c.kvHeads;
        int const last = c.lengths[sequence] - 1;
        size_t const row = (static_cast<size_t>(head) * on.capacity + last) * D;
        T const* const packed = p.packed.data() + static_cast<size_t>(sequence) * c.width() +
                                static_cast<size_t>(c.heads() + head % c.kvHeads) * D;
        std::vector<T> const key = turned(c, p, packed, last);
        std::copy_n(packed + static_cast<size_t>(c.kvHeads) * D, D, values.begin() + row);
        for (int d = 0; d < D; ++d) {
            double const got = widen(gotKeys[row + d]);
            // Float32 sums may round to the neighbour.
            double const allowed = 2.01 * kEPSILON<T> * std::abs(widen(key[d])) + 1e-6;
            if (!(std::abs(got - widen(key[d])) <= allowed)) {
                std::printf("key [%d, %d] is %g, not %g\n", head, d, got, widen(key[d]));
                return false;
            }
            keys[row + d] = gotKeys[row + d];
        }
    }
    return sameBits("keys", gotKeys, keys) && sameBits("values", on.values.read(), values);
}

template <typename T>
bool runCase(Case const& c, DeviceTraits const& device, double& worst) {
    Problem<T> const problem = problemOf<T>(c);
    OnDevice<T> const on(c, problem, 0, c.batch(), c.longest() + 40);
    std::vector<T> const y = on.run(c, device);
    bool ok = checkResult(c, problem, y, worst) && checkCaches(c, problem, on) &&
              sameBits("second run", on.run(c, device), y) &&
              sameBits("two tiles in flight", on.run(c, device, {2, 1}), y);
    for (int sequence = 0; ok && c.batch() > 1 && sequence < c.batch(); ++sequence) {
        OnDevice<T> const alone(c, problem, sequence, 1, c.longest());
        ptrdiff_t const size = static_cast<ptrdiff_t>(c.heads()) * c.headSize;
        ok = sameBits(
            "alone, in another capacity", alone.run(c, device),
            std::vector<T>(y.begin() + sequence * size, y.begin() + (sequence + 1) * size));
    }
    if (!ok) {
        std::printf(
            "FAILED %s batch %d longest %d D %d group %d heads %d window %d R %d count %d\n",
            kIS_HALF<T> ? "half" : "bfloat16", c.batch(), c.longest(), c.headSize, c.group,
            c.kvHeads, c.window, c.rotary, c.isCounting);
    }
    return ok;
}

std::vector<Case> allCases() {
    std::vector<Case> cases;
    std::vector<std::vector<int>> const lengths = {
        {1}, {2}, {16}, {17}, {300}, {2048}, {1, 300, 2048}, {5, 129, 1024, 1, 16, 17, 300, 1025}};
    for (int const headSize : {64, 128}) {
        for (int const group : {1, 4, 8}) {
            for (std::vector<int> const& some : lengths) {
                int const kvHeads = some.size() > 3 ? 4 : 2;
                cases.push_back({some, headSize, group, kvHeads, -1, headSize, false});
                cases.push_back({some, headSize, group, kvHeads, -1, headSize, true});
                if (group == 4) {
                    cases.push_back({some, headSize, group, kvHeads, 200, headSize / 2, false});
                    cases.push_back({some, headSize, group, kvHeads, 33, 0, true});
                    cases.push_back({some, headSize, group, kvHeads, 1, headSize, false});
                }
            }
        }
    }
    return cases;
}

bool refusesWhatDoesNotFit(DeviceTraits const& device) {
    AttentionArgs args;
    args.heads = args.kvHeads = 2;
    args.headSize = args.capacity = 64;
    args.batch = 1;
    bool ok = attentionFits(args, device);
    auto const refuses = [&](auto const& change) {
        AttentionArgs changed = args;
        change(changed);
        return !attentionFits(changed, device) &&
               launchAttention(changed, device, nullptr) == cudaErrorInvalidValue;
    };
    ok = ok && refuses([](AttentionArgs& a) { a.headSize = 96; });
    ok = ok && refuses([](AttentionArgs& a) { a.heads = 18; });
    ok = ok && refuses([](AttentionArgs& a) { a.rotary = 24; });
    ok = ok && refuses([](AttentionArgs& a) { a.type = DType::kFLOAT32; });
    ok = ok && launchAttention(args, device, nullptr) == cudaErrorInvalidValue;  // null pointers
    DeviceTraits old = device;
    old.computeCapability = 89;
    return ok && !attentionFits(args, old);
}

__global__ void pause() {}

//! Microseconds a launch, over caches that do not fit the L2 together, in one CUDA graph; with a
//! kernel between that lets nothing overlap, and without.
float timed(Case const& c, DeviceTraits const& device, AttentionPlan plan, bool isApart,
            bool isEmpty) {
    constexpr int kLAYERS = 40;
    Problem<__half> const problem = problemOf<__half>(c);
    std::vector<OnDevice<__half>*> layers;
    for (int i = 0; i < kLAYERS; ++i) {
        layers.push_back(new OnDevice<__half>(c, problem, 0, c.batch(), c.longest()));
    }
    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t ready;
    cudaEvent_t begin;
    cudaEvent_t end;
    CHECK_CUDA(cudaStreamCreate(&stream));
    CHECK_CUDA(cudaEventCreate(&begin));
    CHECK_CUDA(cudaEventCreate(&end));
    CHECK_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    for (OnDevice<__half>* layer : layers) {
        if (isApart) {
            pause<<<1, 32, 0, stream>>>();
        }
        if (!isEmpty) {
            CHECK_CUDA(launchAttentionWithPlan(layer->args(c), plan, device, stream));
        }
    }
    CHECK_CUDA(cudaStreamEndCapture(stream, &graph));
    CHECK_CUDA(cudaGraphInstantiate(&ready, graph, 0));
    std::vector<float> all;
    for (int run = 0; run < 30; ++run) {
        CHECK_CUDA(cudaEventRecord(begin, stream));
        CHECK_CUDA(cudaGraphLaunch(ready, stream));
        CHECK_CUDA(cudaEventRecord(end, stream));
        CHECK_CUDA(cudaEventSynchronize(end));
        float ms = 0;
        CHECK_CUDA(cudaEventElapsedTime(&ms, begin, end));
        all.push_back(ms * 1000 / kLAYERS);
    }
    std::sort(all.begin(), all.end());
    for (OnDevice<__half>* layer : layers) {
        delete layer;
    }
    CHECK_CUDA(cudaGraphExecDestroy(ready));
    CHECK_CUDA(cudaGraphDestroy(graph));
    CHECK_CUDA(cudaStreamDestroy(stream));
    return all[all.size() / 2];
}

void tellTimes(DeviceTraits const& device) {
    std::puts("half, D 128, 8 heads of keys, 4 of queries to each; microseconds a launch");
    for (int const batch : {1, 4, 8}) {
        for (int const length : {128, 2048, 8192}) {
            Case const c{std::vector<int>(batch, length), 128, 4, 8, -1, 128, false};
            float const empty = timed(c, device, {}, true, true);
            double const bytes = 2.0 * 2 * batch * 8 * length * 128;
            for (int const depth : {1, 2}) {
                float const apart = timed(c, device, {depth, 0}, true, false) - empty;
                float const chained = timed(c, device, {depth, 0}, false, false);
                std::printf(
                    "batch %d length %d depth %d: %.2f after another kernel, %.2f chained "
                    "(%.2f TB/s)\n",
                    batch, length, depth, apart, chained, bytes / chained * 1e-6);
            }
        }
    }
}

}  // namespace

int main(int count, char** words) {
    cudaDeviceProp properties{};
    if (cudaGetDeviceProperties(&properties, 0) != cudaSuccess || properties.major < 9) {
        std::puts("no GPU with clusters: skipped");
        return 77;
    }
    DeviceTraits device{};
    device.computeCapability = 10 * properties.major + properties.minor;
    device.multiprocessors = properties.multiProcessorCount;
    device.sharedBytesPerBlock = static_cast<int32_t>(properties.sharedMemPerBlockOptin);
    int passed = 0;
    int failed = 0;
    double worst = 0;
    for (Case const& c : allCases()) {
        for (bool const ok :
             {runCase<__half>(c, device, worst), runCase<__nv_bfloat16>(c, device, worst)}) {
            ++(ok ? passed : failed);
        }
    }
    ++(refusesWhatDoesNotFit(device) ? passed : failed);
    std::printf("worst error %.2f of what is allowed\n%d passed, %d failed\n", worst, passed,
                failed);
    if (count > 1 && std::string(words[1]) == "--time") {
        tellTimes(device);
    }
    return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
