// Times linears of one token on stored weights beside 16-bit ones: cold, launches in a CUDA graph,
// over the compiled plans; then batches and prompts by way of the executor, and the sizes of
// widened tiles. Prints tables; 40 seconds at most.
//
//     cmake --build build/cuda --target nmexport_bench_stored &&
//     build/cuda/tests/nmexport_bench_stored
#include "linear_executor.h"
#include "stored.h"

#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <functional>
#include <random>
#include <string>
#include <vector>

using namespace nmexport::cuda;

namespace {

void check(cudaError_t status, char const* what) {
    if (status != cudaSuccess) {
        std::printf("%s: %s\n", what, cudaGetErrorString(status));
        std::exit(EXIT_FAILURE);
    }
}

constexpr size_t kROTATED_BYTES = size_t{768} << 20;  // many times the second-level cache
constexpr size_t kSCALE_BYTES = size_t{96} << 20;
constexpr int kREPLAYS = 9;
constexpr int kLAUNCHES = 40;

__global__ void fillKernel(uint32_t* words, size_t count) {
    size_t const stride = static_cast<size_t>(gridDim.x) * blockDim.x;
    for (size_t i = blockIdx.x * static_cast<size_t>(blockDim.x) + threadIdx.x; i < count;
         i += stride) {
        uint32_t const mixed =
            static_cast<uint32_t>(i * 2654435761U) ^ static_cast<uint32_t>(i >> 7);
        words[i] = mixed & 0xbf7fbf7fU;  // no NaN, whatever it is read as
    }
}

__global__ void fillOnes(__half* values, size_t count) {
    size_t const stride = static_cast<size_t>(gridDim.x) * blockDim.x;
    for (size_t i = blockIdx.x * static_cast<size_t>(blockDim.x) + threadIdx.x; i < count;
         i += stride) {
        values[i] = __float2half(0.01F);
    }
}

struct Buffers {
    Buffers() {
        check(cudaStreamCreate(&stream), "a stream");
        check(cudaMalloc(&weights, kROTATED_BYTES), "weights");
        check(cudaMalloc(&scales, kSCALE_BYTES), "scales");
        check(cudaMalloc(&y, size_t{64} << 20), "y");
        check(cudaMalloc(&workspace, size_t{512} << 20), "workspace");
        fillKernel<<<1024, 256>>>(static_cast<uint32_t*>(weights), kROTATED_BYTES / 4);
        fillOnes<<<1024, 256>>>(static_cast<__half*>(scales), kSCALE_BYTES / 2);
        check(cudaDeviceSynchronize(), "the fill");
    }

    //! Copy i of an array of so many bytes, each on a place of its own as long as there is room.
    static void const* copyOf(void const* buffer, size_t size, size_t bytes, int i) {
        size_t const step = (bytes + 255) / 256 * 256;
        return static_cast<char const*>(buffer) + static_cast<size_t>(i) % (size / step) * step;
    }

    cudaStream_t stream{};
    void* weights{};
    void* scales{};
    void* y{};
    void* workspace{};
};

//! Normal rows, each pruned to 8 of 16 where asked.
std::vector<__half> rowsOf(int tokens, int channels, bool isPruned) {
    std::mt19937 random(7);
    std::normal_distribution<float> normal;
    std::vector<__half> rows;
    for (int group = 0; group < tokens * channels / 16; ++group) {
        std::vector<float> values(16);
        std::generate(values.begin(), values.end(), [&] { return normal(random); });
        std::vector<float> sizes = values;
        std::transform(sizes.begin(), sizes.end(), sizes.begin(),
                       [](float v) { return std::fabs(v); });
        std::nth_element(sizes.begin(), sizes.begin() + 7, sizes.end());
        for (float const value : values) {
            rows.push_back(__float2half(isPruned && std::fabs(value) <= sizes[7] ? 0.0F : value));
        }
    }
    return rows;
}

//! Microseconds of one launch: the median of replays of a graph of kLAUNCHES.
double timed(Buffers const& buffers, std::function<cudaError_t(int)> const& launch) {
    cudaGraph_t graph{};
    cudaGraphExec_t run{};
    check(launch(0), "a launch");
    check(cudaStreamBeginCapture(buffers.stream, cudaStreamCaptureModeThreadLocal), "a capture");
    for (int i = 0; i < kLAUNCHES; ++i) {
        check(launch(i), "a captured launch");
    }
    check(cudaStreamEndCapture(buffers.stream, &graph), "a capture's end");
    check(cudaGraphInstantiate(&run, graph, 0), "a graph");
    cudaEvent_t begin{}, end{};
    check(cudaEventCreate(&begin), "an event");
    check(cudaEventCreate(&end), "an event");
    std::vector<float> times;
    for (int replay = 0; replay < kREPLAYS + 2; ++replay) {
        check(cudaEventRecord(begin, buffers.stream), "an event");
        check(cudaGraphLaunch(run, buffers.stream), "a graph's launch");
        check(cudaEventRecord(end, buffers.stream), "an event");
        check(cudaEventSynchronize(end), "a graph's run");
        float ms = 0;
        check(cudaEventElapsedTime(&ms, begin, end), "a time");
        times.push_back(ms);
    }
    check(cudaEventDestroy(begin), "an event");
    check(cudaEventDestroy(end), "an event");
    check(cudaGraphExecDestroy(run), "a graph");
    check(cudaGraphDestroy(graph), "a graph");
    std::sort(times.begin() + 2, times.end());  // the first two warm up
    return times[2 + kREPLAYS / 2] * 1e3 / kLAUNCHES;
}

struct Kind {
    char const* name;
    WeightType type;
    int groupSize;  //!< 0: one group

    size_t weightBytes(int channels, int outputs) const {
        size_t const count = static_cast<size_t>(channels) * outputs;
        return type == WeightType::kT ? 2 * count : type == WeightType::kINT4 ? count / 2 : count;
    }

    int groups(int channels) const { return groupSize == 0 ? 1 : channels / groupSize; }

    size_t scaleBytes(int channels, int outputs) const {
        return type == WeightType::kT ? 0 : size_t{2} * groups(channels) * outputs;
    }
};

constexpr Kind kKINDS[] = {{"16 bit", WeightType::kT, 0},
                           {"int8", WeightType::kINT8, 0},
                           {"float8 g128", WeightType::kFLOAT8, 128},
                           {"int4 g128", WeightType::kINT4, 128},
                           {"int4 g32", WeightType::kINT4, 32}};

//! One linear with rotated weights; `x` on the device.
LinearArgs argsOf(Buffers const& buffers, Kind const& kind, int tokens, int channels, int outputs,
                  bool isPruned, void const* x, int i) {
    LinearArgs args;
    args.type = DType::kFLOAT16;
    args.tokens = tokens;
    args.channels = channels;
    args.outputs = outputs;
    args.selection.n = args.selection.m;
    args.isPruned = isPruned;
    args.x = x;
    args.w =
        Buffers::copyOf(buffers.weights, kROTATED_BYTES, kind.weightBytes(channels, outputs), i);
    args.y = buffers.y;
    args.stored.type = kind.type;
    if (kind.type != WeightType::kT) {
        args.stored.groups = kind.groups(channels);
        args.stored.scaleIsT = true;
        args.stored.scale =
            Buffers::copyOf(buffers.scales, kSCALE_BYTES, kind.scaleBytes(channels, outputs), i);
    }
    return args;
}

struct Rows {
    Rows(int tokens, int channels, bool isPruned) {
        std::vector<__half> const rows = rowsOf(tokens, channels, isPruned);
        check(cudaMalloc(&x, rows.size() * sizeof(__half)), "x");
        check(cudaMemcpy(x, rows.data(), rows.size() * sizeof(__half), cudaMemcpyHostToDevice),
              "x");
    }

    ~Rows() { cudaFree(x); }

    Rows(Rows const&) = delete;
    Rows& operator=(Rows const&) = delete;

    void* x{};
};

struct Fastest {
    double us{1e9};
    DecodePlan plan{};
};

//! The fastest of all compiled plans.
Fastest sweep(Buffers const& buffers, DeviceTraits const& device,
              std::function<LinearArgs(int)> const& argsAt) {
    Fastest best;
    for (StoredPlanShape const& shape : kSTORED_SHAPES) {
        if (!hasShape(argsAt(0).stored.type, shape)) {
            continue;
        }
        for (int cluster = 1; cluster <= 8; ++cluster) {
            DecodePlan plan = storedPlan(argsAt(0), device);
            plan.warps = shape.warps;
            plan.unroll = shape.unroll;
            plan.cluster = cluster;
            if (launchStoredWithPlan(argsAt(0), {}, plan, device, buffers.stream) != cudaSuccess) {
                continue;  // not compiled for this type
            }
            double const us = timed(buffers, [&](int i) {
                return launchStoredWithPlan(argsAt(i), {}, plan, device, buffers.stream);
            });
            std::printf("   %dx%d c%d %.2f", shape.warps, shape.unroll, cluster, us);
            if (us < best.us) {
                best = {us, plan};
            }
        }
    }
    return best;
}

void timeOneToken(Buffers const& buffers, DeviceTraits const& device, int channels, int outputs) {
    for (bool const isPruned : {false, true}) {
        Rows const rows(1, channels, isPruned);
        for (Kind const& kind : kKINDS) {
            auto const argsAt = [&](int i) {
                return argsOf(buffers, kind, 1, channels, outputs, isPruned, rows.x, i);
            };
            double const us = timed(
                buffers, [&](int i) { return launchDecode(argsAt(i), device, buffers.stream); });
            double const bytes = kind.weightBytes(channels, outputs) * (isPruned ? 0.5 : 1.0) +
                                 kind.scaleBytes(channels, outputs);
            std::printf("%5d x %5d  %-5s  %-11s  %7.2f us  %5.2f TB/s", channels, outputs,
                        isPruned ? "8:16" : "dense", kind.name, us, bytes / us * 1e-6);
            if (kind.type != WeightType::kT) {
                DecodePlan const rule = storedPlan(argsAt(0), device);
                Fastest const best = sweep(buffers, device, argsAt);
                std::printf("  rule %dx%d c%d  best %7.2f us with %dx%d c%d", rule.warps,
                            rule.unroll, rule.cluster, best.us, best.plan.warps, best.plan.unroll,
                            best.plan.cluster);
            }
            std::printf("\n");
            std::fflush(stdout);
        }
    }
}

//! Batches and prompts as the executor runs them, and with the path forced to the product.
void timeBatches(Buffers const& buffers, DeviceTraits const& device, int channels, int outputs) {
    for (int const tokens : {1, 2, 4, 8, 16, 32, 512}) {
        Rows const rows(tokens, channels, true);
        std::printf("%5d x %5d  %4d tokens", channels, outputs, tokens);
        for (Kind const& kind : {kKINDS[0], kKINDS[1], kKINDS[3]}) {
            for (LinearPath const path : {LinearPath::kFASTER, LinearPath::kPRODUCT}) {
                LinearExecutor executor;
                double const us = timed(buffers, [&](int i) {
                    executor.run(argsOf(buffers, kind, tokens, channels, outputs, true, rows.x, i),
                                 device, path, buffers.workspace, buffers.stream);
                    return cudaSuccess;
                });
                std::printf("  %s %s %7.2f", kind.name,
                            path == LinearPath::kFASTER ? "chosen" : "product", us);
            }
        }
        std::printf("\n");
        std::fflush(stdout);
    }
}

//! The product of widened rows, with tiles of several sizes; the widening of one tile beside it.
void timeTiles(Buffers const& buffers, DeviceTraits const& device, int channels, int outputs) {
    for (int const tokens : {16, 128, 512}) {
        Rows const rows(tokens, channels, true);
        for (Kind const& kind : {kKINDS[1], kKINDS[3]}) {
            std::printf("%5d x %5d  %4d tokens  %-9s", channels, outputs, tokens, kind.name);
            for (int64_t const megabytes : {8, 16, 32, 64, 256}) {
                auto const argsAt = [&](int i) {
                    LinearArgs args =
                        argsOf(buffers, kind, tokens, channels, outputs, true, rows.x, i);
                    args.tileBytes = megabytes << 20;
                    return args;
                };
                LinearExecutor executor;
                double const us = timed(buffers, [&](int i) {
                    executor.run(argsAt(i), device, LinearPath::kPRODUCT, buffers.workspace,
                                 buffers.stream);
                    return cudaSuccess;
                });
                std::printf("  %3d MB %7.2f", static_cast<int>(megabytes), us);
            }
            std::printf("\n");
            std::fflush(stdout);
        }
    }
}

//! The widening alone: of a whole weight at once, and tile by tile to the same place.
void timeWidening(Buffers const& buffers, int channels, int outputs) {
    for (Kind const& kind : {kKINDS[1], kKINDS[2], kKINDS[3]}) {
        std::printf("%5d x %5d  widening alone  %-11s", channels, outputs, kind.name);
        for (int const tiles : {1, 2, 4, 8, 16}) {
            int const columns = outputs / tiles;
            double const us = timed(buffers, [&](int i) {
                LinearArgs const args =
                    argsOf(buffers, kind, 1, channels, outputs, true, nullptr, i);
                for (int tile = 0; tile < tiles; ++tile) {
                    check(launchWiden({args.type, channels, outputs, args.w, args.stored,
                                       tile * columns, columns, buffers.workspace},
                                      buffers.stream),
                          "a widening");
                }
                return cudaSuccess;
            });
            std::printf("  %2d tiles %7.2f", tiles, us);
        }
        std::printf("\n");
    }
}

}  // namespace

int main() {
    DeviceTraits device{};
    check(queryDevice(&device), "a GPU");
    Buffers const buffers;
    constexpr int kSHAPES[][2] = {
        {4096, 4096}, {4096, 6144}, {4096, 14336}, {4096, 28672}, {14336, 4096}};
    for (auto const& shape : kSHAPES) {
        timeOneToken(buffers, device, shape[0], shape[1]);
    }
    try {
        timeBatches(buffers, device, 4096, 14336);
        timeBatches(buffers, device, 14336, 4096);
        for (auto const& shape : {kSHAPES[2], kSHAPES[4]}) {
            timeWidening(buffers, shape[0], shape[1]);
            timeTiles(buffers, device, shape[0], shape[1]);
        }
    } catch (std::exception const& error) {
        std::printf("batches: %s\n", error.what());
    }
    return EXIT_SUCCESS;
}
