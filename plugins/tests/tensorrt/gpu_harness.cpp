// The built plugin library on a GPU, driven as TensorRT drives it, against the CPU kernels.
//
//   gpu_harness libnmexport_tensorrt.so
//
// Each case is made by the creator, cloned, serialised, made again from its plan fields, cloned,
// attached, run, run once more, captured into a CUDA graph and replayed, and run by a clone: all
// four runs must give the same bits, and values within the op contract's tolerance of the CPU's.
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <random>

#include "../expect.h"
#include "builder_side.h"
#include "element.h"
#include "nm_linear.h"
#include "nm_prune.h"

namespace nmexport::test {

using namespace nvinfer1;

namespace {

using GetCreators = IPluginCreatorInterface* const* (*)(std::int32_t&);
using Plugin = std::unique_ptr<IPluginV3>;

GetCreators gGetCreators = nullptr;

void require(cudaError_t status, const char* what) {
    if (status == cudaSuccess) return;
    std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(status));
    std::exit(2);
}

// Device memory with the host's bytes in it.
class Device {
  public:
    explicit Device(const std::vector<std::uint8_t>& bytes) : Device(bytes.size()) {
        require(cudaMemcpy(mData, bytes.data(), bytes.size(), cudaMemcpyHostToDevice), "upload");
    }
    explicit Device(std::size_t size) : mSize(size) {
        require(cudaMalloc(&mData, std::max<std::size_t>(size, 1)), "cudaMalloc");
    }
    Device(Device&& other) noexcept : mData(other.mData), mSize(other.mSize) {
        other.mData = nullptr;
    }
    Device(const Device&) = delete;
    Device& operator=(const Device&) = delete;
    ~Device() { cudaFree(mData); }
    void* data() const { return mData; }
    std::vector<std::uint8_t> bytes() const {
        std::vector<std::uint8_t> host(mSize);
        require(cudaMemcpy(host.data(), mData, mSize, cudaMemcpyDeviceToHost), "download");
        return host;
    }
    void clear() { require(cudaMemset(mData, 0xff, mSize), "cudaMemset"); }

  private:
    void* mData{nullptr};
    std::size_t mSize;
};

struct Options {
    const char* op;
    ElementType type;
    std::int64_t tokens;
    std::int64_t channels;
    std::int64_t outputs;
    Pattern pattern;
    bool bias, shift, perChannelShift, dynamicShift, variance, scale, order, valueScale;
    const char* phase;
};

std::vector<std::uint8_t> elements(const std::vector<float>& values, ElementType type) {
    std::vector<std::uint8_t> bytes(values.size() * elementBytes(type));
    for (std::size_t i = 0; i < values.size(); ++i) {
        if (type == ElementType::kFLOAT32) {
            std::memcpy(&bytes[i * 4], &values[i], 4);
        } else if (type == ElementType::kFLOAT16) {
            Float16 half{};
            fromFloat(values[i], &half);
            std::memcpy(&bytes[i * 2], &half, 2);
        } else {
            BFloat16 half{};
            fromFloat(values[i], &half);
            std::memcpy(&bytes[i * 2], &half, 2);
        }
    }
    return bytes;
}

float element(const std::vector<std::uint8_t>& bytes, std::size_t i, ElementType type) {
    float value = 0;
    if (type == ElementType::kFLOAT32) {
        std::memcpy(&value, &bytes[i * 4], 4);
    } else if (type == ElementType::kFLOAT16) {
        Float16 half{};
        std::memcpy(&half, &bytes[i * 2], 2);
        value = toFloat(half);
    } else {
        BFloat16 half{};
        std::memcpy(&half, &bytes[i * 2], 2);
        value = toFloat(half);
    }
    return value;
}

std::vector<std::uint8_t> raw(const void* data, std::size_t size) {
    const auto* bytes = static_cast<const std::uint8_t*>(data);
    return std::vector<std::uint8_t>(bytes, bytes + size);
}

DataType trtType(ElementType type) {
    if (type == ElementType::kFLOAT32) return DataType::kFLOAT;
    return type == ElementType::kFLOAT16 ? DataType::kHALF : DataType::kBF16;
}

struct Input {
    const char* name;
    Tensor tensor;
    std::vector<std::uint8_t> bytes;
};

struct Problem {
    std::vector<Input> inputs;
    const std::uint8_t* find(const char* name) const {
        for (const Input& input : inputs) {
            if (std::strcmp(input.name, name) == 0) return input.bytes.data();
        }
        return nullptr;
    }
};

std::vector<float> normals(std::mt19937& random, std::int64_t count, float deviation) {
    std::normal_distribution<float> normal(0.0F, deviation);
    std::vector<float> values(static_cast<std::size_t>(count));
    for (float& value : values) value = normal(random);
    return values;
}

Problem problemOf(const Options& o, std::mt19937& random) {
    Problem problem;
    const auto addT = [&](const char* name, std::vector<std::int64_t> sizes, float deviation) {
        std::int64_t count = 1;
        for (const std::int64_t size : sizes) count *= size;
        problem.inputs.push_back(
            {name, {sizes, trtType(o.type)}, elements(normals(random, count, deviation), o.type)});
    };
    const auto addFloats = [&](const char* name, const std::vector<float>& values) {
        problem.inputs.push_back({name,
                                  {{static_cast<std::int64_t>(values.size())}, DataType::kFLOAT},
                                  raw(values.data(), values.size() * sizeof(float))});
    };
    addT("X", {1, o.tokens, o.channels}, 1.0F);
    if (std::strcmp(o.op, "NMLinear") == 0) {
        addT("W", {o.channels, o.outputs}, 0.05F);
        if (o.bias) addT("bias", {o.outputs}, 0.5F);
        if (o.shift) addFloats("shift", normals(random, o.perChannelShift ? o.channels : 1, 0.3F));
        if (o.dynamicShift) addFloats("shift_weight", normals(random, o.outputs, 0.5F));
    }
    if (o.scale) {
        std::vector<float> scale = normals(random, o.channels, 1.0F);
        for (float& value : scale) value = std::fabs(value) + 0.1F;
        addFloats("score_scale", scale);
    }
    const auto addOrder = [&] {
        std::vector<std::int32_t> order(static_cast<std::size_t>(o.channels));
        for (std::size_t i = 0; i < order.size(); ++i) order[i] = static_cast<std::int32_t>(i);
        std::shuffle(order.begin(), order.end(), random);
        problem.inputs.push_back({"channel_order",
                                  {{o.channels}, DataType::kINT32},
                                  raw(order.data(), order.size() * 4)});
    };
    if (o.order) addOrder();
    if (o.valueScale) addFloats("value_scale", normals(random, o.channels, 1.0F));
    if (std::strcmp(o.phase, "all") != 0) {
        if (o.valueScale) addFloats("dense_scale", normals(random, o.channels, 1.0F));
        addT("dense_bias", {o.outputs}, 0.5F);
    }
    return problem;
}

bool sparsifies(const Options& o) {
    const std::string phase = o.phase;
    return phase == "all" || (phase == "decode") == (o.tokens == 1);
}

std::vector<std::uint8_t> onCpu(const Options& o, const Problem& problem) {
    const bool isLinear = std::strcmp(o.op, "NMLinear") == 0;
    const std::int64_t width = isLinear ? o.outputs : o.channels;
    std::vector<std::uint8_t> y(static_cast<std::size_t>(o.tokens * width) * elementBytes(o.type));
    const auto floats = [&](const char* name) {
        return reinterpret_cast<const float*>(problem.find(name));
    };
    const auto* order = reinterpret_cast<const std::int32_t*>(problem.find("channel_order"));
    const ThreadPool pool{[](void*, std::size_t tasks, void (*task)(void*, std::size_t), void* s) {
                              for (std::size_t i = 0; i < tasks; ++i) task(s, i);
                          },
                          nullptr, 1};
    if (!isLinear) {
        PruneArguments args{};
        args.type = o.type;
        args.x = problem.find("X");
        args.y = y.data();
        args.tokens = static_cast<std::size_t>(o.tokens);
        args.channels = static_cast<std::size_t>(o.channels);
        args.pattern = o.pattern;
        args.scoreScale = floats("score_scale");
        args.channelOrder = order;
        nmPrune(args, pool);
        return y;
    }
    LinearArguments args{};
    args.type = o.type;
    args.x = problem.find("X");
    args.w = problem.find("W");
    args.y = y.data();
    args.tokens = static_cast<std::size_t>(o.tokens);
    args.channels = static_cast<std::size_t>(o.channels);
    args.outputs = static_cast<std::size_t>(o.outputs);
    args.pattern = o.pattern;
    args.constants.channelOrder = order;
    if (!sparsifies(o)) {
        args.keepAll = true;
        args.bias = problem.find("dense_bias");
        args.valueScale = floats("dense_scale");
        nmLinear(args, pool);
        return y;
    }
    args.bias = problem.find("bias");
    args.shiftWeight = floats("shift_weight");
    args.constants.dynamicShift = o.dynamicShift;
    args.constants.shift = floats("shift");
    args.constants.shiftCount =
        o.shift ? static_cast<std::size_t>(o.perChannelShift ? o.channels : 1) : 0;
    args.constants.scoreScale = floats("score_scale");
    args.valueScale = floats("value_scale");
    args.varianceCorrection = o.variance;
    args.varianceFloor = 1e-12;
    nmLinear(args, pool);
    return y;
}

IPluginCreatorV3One& creatorOf(const std::string& op) {
    std::int32_t count = 0;
    IPluginCreatorInterface* const* creators = gGetCreators(count);
    for (std::int32_t i = 0; i < count; ++i) {
        auto* creator = static_cast<IPluginCreatorV3One*>(creators[i]);
        if (creator->getPluginName() == op) return *creator;
    }
    std::fprintf(stderr, "no creator of %s\n", op.c_str());
    std::exit(2);
}

IPluginV3OneRuntime& runtime(IPluginV3& plugin) {
    return *static_cast<IPluginV3OneRuntime*>(
        plugin.getCapabilityInterface(PluginCapabilityType::kRUNTIME));
}

// The original is gone before its clone is used.
Plugin cloneOf(Plugin original) {
    Plugin copied(original->clone());
    if (copied == nullptr) std::exit(2);
    return copied;
}

// Made by fields, configured, and made again from the plan.
Plugin pluginOf(const Options& o, const Problem& problem, std::size_t& workspace) {
    Fields fields;
    fields.integer("n", o.pattern.n).integer("m", o.pattern.m);
    if (std::strcmp(o.op, "NMLinear") == 0) {
        fields.integer("dynamic_shift", o.dynamicShift ? 1 : 0)
            .integer("variance_correction", o.variance ? 1 : 0)
            .text("phase", o.phase);
    }
    std::string present;
    std::vector<DynamicPluginTensorDesc> dynamic;
    for (const Input& input : problem.inputs) {
        present += (present.empty() ? "" : ",") + std::string(input.name);
        const std::int64_t first = input.tensor.sizes[0];
        dynamic.push_back(describe(input.tensor, first, first));
    }
    fields.text("present_inputs", present);
    IPluginCreatorV3One& creator = creatorOf(o.op);
    Plugin built(creator.createPlugin("case", fields.collection(), TensorRTPhase::kBUILD));
    if (built == nullptr) std::exit(2);
    built = cloneOf(std::move(built));
    auto& build = *static_cast<IPluginV3OneBuild*>(
        built->getCapabilityInterface(PluginCapabilityType::kBUILD));
    const auto count = static_cast<std::int32_t>(dynamic.size());
    EXPECT(build.configurePlugin(dynamic.data(), count, nullptr, 1) == 0);
    workspace = build.getWorkspaceSize(dynamic.data(), count, nullptr, 1);
    const SerialisedFields plan(*runtime(*built).getFieldsToSerialize());
    Plugin loaded(creator.createPlugin("case", plan.collection(), TensorRTPhase::kRUNTIME));
    if (loaded == nullptr) std::exit(2);
    loaded = cloneOf(std::move(loaded));
    Plugin attached(runtime(*loaded).attachToContext(nullptr));
    if (attached == nullptr) std::exit(2);
    return attached;
}

// Two units in the last place of T, and the float32 term of the contract.
bool close(float got, float wanted, const Options& o) {
    if (std::isnan(wanted)) return std::isnan(got);
    const float relative = 1e-5F * std::sqrt(static_cast<float>(o.channels));
    const float magnitude = std::max(std::fabs(wanted), 1.0F);
    float ulps = 0;
    if (o.type == ElementType::kFLOAT16) ulps = 2 * magnitude * 0x1p-10F;
    if (o.type == ElementType::kBFLOAT16) ulps = 2 * magnitude * 0x1p-7F;
    return std::fabs(got - wanted) <= ulps + relative * magnitude;
}

void check(const Options& o, std::int32_t tactic, std::mt19937& random) {
    const Problem problem = problemOf(o, random);
    std::size_t workspaceBytes = 0;
    const Plugin plugin = pluginOf(o, problem, workspaceBytes);
    IPluginV3OneRuntime& side = runtime(*plugin);
    if (tactic != 0) side.setTactic(tactic);
    std::vector<Device> devices;
    std::vector<const void*> data;
    std::vector<PluginTensorDesc> descriptions;
    for (const Input& input : problem.inputs) {
        devices.emplace_back(input.bytes);
        data.push_back(devices.back().data());
        descriptions.push_back(describe(input.tensor));
    }
    const bool isLinear = std::strcmp(o.op, "NMLinear") == 0;
    const std::int64_t width = isLinear ? o.outputs : o.channels;
    const PluginTensorDesc output = describe({{1, o.tokens, width}, trtType(o.type)});
    Device y(static_cast<std::size_t>(o.tokens * width) * elementBytes(o.type));
    Device workspace(workspaceBytes);
    void* outputs[] = {y.data()};
    const auto count = static_cast<std::int32_t>(descriptions.size());
    EXPECT(side.onShapeChange(descriptions.data(), count, &output, 1) == 0);
    cudaStream_t stream = nullptr;
    require(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "a stream");
    const auto enqueue = [&](IPluginV3OneRuntime& by) {
        EXPECT(by.enqueue(descriptions.data(), &output, data.data(), outputs, workspace.data(),
                          stream) == 0);
    };
    std::vector<std::vector<std::uint8_t>> runs;
    for (int i = 0; i < 2; ++i) {
        y.clear();
        enqueue(side);
        require(cudaStreamSynchronize(stream), "a run");
        runs.push_back(y.bytes());
    }
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t executable = nullptr;
    require(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
    enqueue(side);
    require(cudaStreamEndCapture(stream, &graph), "the end of a capture");
    require(cudaGraphInstantiate(&executable, graph, 0), "a graph");
    y.clear();
    require(cudaGraphLaunch(executable, stream), "a graph's launch");
    require(cudaStreamSynchronize(stream), "a graph's run");
    runs.push_back(y.bytes());
    const Plugin copied(plugin->clone());
    EXPECT(copied != nullptr);
    EXPECT(runtime(*copied).onShapeChange(descriptions.data(), count, &output, 1) == 0);
    y.clear();
    enqueue(runtime(*copied));
    require(cudaStreamSynchronize(stream), "a clone's run");
    runs.push_back(y.bytes());
    for (std::size_t i = 1; i < runs.size(); ++i) EXPECT(runs[0] == runs[i]);
    cudaGraphExecDestroy(executable);
    cudaGraphDestroy(graph);
    cudaStreamDestroy(stream);

    const std::vector<std::uint8_t> wanted = onCpu(o, problem);
    std::size_t wrong = 0;
    for (std::size_t i = 0; i < static_cast<std::size_t>(o.tokens * width); ++i) {
        const float a = element(runs[0], i, o.type);
        const float b = element(wanted, i, o.type);
        if (isLinear ? !close(a, b, o) : std::memcmp(&a, &b, 4) != 0) ++wrong;
    }
    if (wrong > 0) {
        std::fprintf(stderr,
                     "%s type %d tokens %lld K %lld O %lld %d:%d bias %d shift %d%d dynamic %d var "
                     "%d scale %d order %d values %d phase %s tactic %d: %zu wrong\n",
                     o.op, static_cast<int>(o.type), static_cast<long long>(o.tokens),
                     static_cast<long long>(o.channels), static_cast<long long>(o.outputs),
                     o.pattern.n, o.pattern.m, o.bias, o.shift, o.perChannelShift, o.dynamicShift,
                     o.variance, o.scale, o.order, o.valueScale, o.phase, tactic, wrong);
    }
    // The sum's order may decide between scores that agree to 1e-5: one token may keep another.
    EXPECT(wrong <= (o.dynamicShift ? static_cast<std::size_t>(width) : 0));
}

int runAll() {
    std::mt19937 random(7);
    int cases = 0;
    for (const ElementType type :
         {ElementType::kFLOAT32, ElementType::kFLOAT16, ElementType::kBFLOAT16}) {
        for (const std::int64_t tokens : {1, 2, 4, 5, 33, 128}) {
            for (const Pattern pattern :
                 {Pattern{8, 16}, Pattern{2, 4}, Pattern{3, 8}, Pattern{16, 32}, Pattern{16, 16}}) {
                for (int options = 0; options < 12; ++options) {
                    Options o{};
                    o.op = "NMLinear";
                    o.type = type;
                    o.tokens = tokens;
                    o.channels = 576;
                    o.outputs = 192;
                    o.pattern = pattern;
                    o.phase = "all";
                    o.bias = options % 2 == 1;
                    o.scale = options % 3 == 1;
                    o.order = options % 4 == 2;
                    o.valueScale = options % 5 == 2;
                    o.variance = options >= 6;
                    o.shift = options == 3 || options == 8;
                    o.perChannelShift = options == 8;
                    o.dynamicShift = options == 5 || options == 10;
                    if (options == 7 || options == 9) o.phase = "decode";
                    if (options == 11) o.phase = "prefill";
                    check(o, 1, random);
                    if (tokens <= 4) check(o, 2, random);
                    ++cases;
                }
                Options prune{};
                prune.op = "NMPrune";
                prune.type = type;
                prune.tokens = tokens;
                prune.channels = 576;
                prune.pattern = pattern;
                prune.scale = tokens % 2 == 1;
                prune.order = tokens % 4 == 0 || tokens == 5;
                prune.phase = "all";
                check(prune, 0, random);
                ++cases;
            }
        }
    }
    std::printf("%d cases\n", cases);
    return report("tensorrt plugin on the GPU");
}

}  // namespace

int open(const char* path) {
    void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
        std::fprintf(stderr, "%s\n", dlerror());
        return 2;
    }
    gGetCreators = reinterpret_cast<GetCreators>(dlsym(library, "getCreators"));
    return gGetCreators == nullptr ? 2 : runAll();
}

}  // namespace nmexport::test

int main(int count, char** arguments) {
    if (count != 2) {
        std::fprintf(stderr, "usage: gpu_harness libnmexport_tensorrt.so\n");
        return 2;
    }
    return nmexport::test::open(arguments[1]);
}
