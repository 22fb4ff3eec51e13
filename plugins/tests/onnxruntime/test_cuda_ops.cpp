// NMLinear and NMPrune of ONNX Runtime's CUDA provider, on kernels and a runtime that only take
// notes.
#include <cuda_runtime_api.h>

#include <cstring>
#include <numeric>

#include "../expect.h"
#include "../tensorrt/recording_kernels.h"
#include "cuda_stored.h"
#include "custom_op.h"
#include "fake_runtime.h"

extern "C" cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}

extern "C" cudaError_t cudaMemcpy(void* target, const void* source, std::size_t size,
                                  cudaMemcpyKind) {
    std::memcpy(target, source, size);
    return cudaSuccess;
}

namespace nmexport::test {

namespace {

constexpr std::int64_t kK = 32;
constexpr std::int64_t kO = 48;

void reset() {
    launches() = {};
    memory() = {};
    noteMemory([](const char* event) { launches().order.push_back(event); });
}

FakeTensor orderOf(bool isPermutation) {
    FakeTensor order = tensor({kK});
    std::vector<std::int32_t> channels(kK);
    std::iota(channels.begin(), channels.end(), isPermutation ? 0 : 1);
    std::memcpy(order.bytes.data(), channels.data(), order.bytes.size());
    return order;
}

// An NMLinear of float32 with every constant of the selection.
struct Linear {
    explicit Linear(std::int64_t tokens) : x(tensor({1, tokens, kK}, false)) {
        node.attributes = {{"n", 8}, {"m", 16}, {"dynamic_shift", 0}, {"variance_correction", 0}};
        node.inputs = {&x, &w, nullptr, &shift, nullptr, &scale, &order, nullptr, &valueScale};
    }
    // Sparse in single tokens alone; the others have a scale, and a bias of their own or none.
    void sparsifyDecode(bool hasDenseBias) {
        node.texts["phase"] = "decode";
        node.inputs.resize(12);
        node.inputs[2] = &bias;
        node.inputs[10] = &denseScale;
        node.inputs[11] = hasDenseBias ? &denseBias : nullptr;
    }
    std::unique_ptr<Kernel> kernel() const {
        return makeCudaLinearKernel(fakeApi(), node.info(), ElementType::kFLOAT32,
                                    storedTypesFor(ElementType::kFLOAT32).front());
    }

    FakeTensor x;
    FakeTensor w{tensor({kK, kO})};
    FakeTensor bias{tensor({kO})};
    FakeTensor shift{tensor({kK})};
    FakeTensor scale{tensor({kK})};
    FakeTensor valueScale{tensor({kK})};
    FakeTensor denseScale{tensor({kK})};
    FakeTensor denseBias{tensor({kO})};
    FakeTensor order{orderOf(true)};
    FakeNode node;
};

// What the node says where it cannot be made or run; empty where it can.
template <typename Made>
std::string refusal(const Made& made) {
    try {
        FakeRun run(made.node);
        made.kernel()->run(run.context());
    } catch (const std::exception& fault) {
        return fault.what();
    }
    return "";
}

bool says(const std::string& text, const char* part) {
    return text.find(part) != std::string::npos;
}

void fewTokensNeedNoScratch() {
    reset();
    const Linear linear(1);
    EXPECT(refusal(linear).empty());
    EXPECT((launches().order == std::vector<std::string>{"decode"}));
    const cuda::Selection& selection = launches().decodes.at(0).selection;
    EXPECT(selection.scoreScale != nullptr && selection.channelOrder != nullptr);
    EXPECT(selection.valueScale != nullptr);
    EXPECT(selection.shiftLength == kK && selection.n == 8);
}

// Memory of the run's stream: what OrtAllocator::Alloc gives may go to another run at once.
void scratchBelongsToTheRunsStream() {
    reset();
    Linear linear(7);
    linear.node.inputs[2] = &linear.bias;
    const std::unique_ptr<Kernel> kernel = linear.kernel();
    FakeRun first(linear.node);
    FakeRun second(linear.node);
    kernel->run(first.context());
    kernel->run(second.context());
    EXPECT((memory().runs == std::vector<OrtKernelContext*>{first.context(), second.context()}));
    EXPECT(memory().allocations == 0);
    EXPECT(memory().held.empty());
    const std::vector<std::string> one{"scratch", "mask", "product", "free"};
    std::vector<std::string> both = one;
    both.insert(both.end(), one.begin(), one.end());
    EXPECT(launches().order == both);
    // cuBLASLt adds the bias before it rounds.
    EXPECT(launches().products.at(0).hasBias && !launches().products.at(0).floatResult);
    EXPECT((first.output.shape == Shape{1, 7, kO}));
}

void aFailedLaunchGivesScratchBack() {
    reset();
    const Linear linear(7);
    launches().next = static_cast<cudaError_t>(700);
    EXPECT(says(refusal(linear), "cudaErrorTest"));
    launches().next = cudaSuccess;
    const std::unique_ptr<Kernel> kernel = linear.kernel();
    FakeRun run(linear.node);
    launches().next = static_cast<cudaError_t>(700);
    std::string said;
    try {
        kernel->run(run.context());
    } catch (const std::exception& fault) {
        said = fault.what();
    }
    EXPECT(says(said, "the mask kernel failed: cudaErrorTest"));
    EXPECT(memory().held.empty());
}

void missingScratchIsTold() {
    reset();
    const Linear linear(7);
    memory().isSpent = true;
    EXPECT(says(refusal(linear), "no memory left"));
    EXPECT(launches().order.empty());
}

// Where nothing is dropped, shifted or reordered, s is X itself.
void denseTokensNeedNoMask() {
    reset();
    Linear linear(7);
    linear.node.inputs = {&linear.x, &linear.w};
    linear.node.attributes["n"] = 16;
    EXPECT(refusal(linear).empty());
    EXPECT((launches().order == std::vector<std::string>{"scratch", "product", "free"}));
    reset();
    linear.node.inputs = {&linear.x, &linear.w, nullptr, nullptr, nullptr, nullptr, &linear.order};
    EXPECT(refusal(linear).empty());
    EXPECT((launches().order == std::vector<std::string>{"scratch", "mask", "product", "free"}));
    EXPECT(launches().masks.at(0).isGathered && launches().masks.at(0).selection.n == 16);
}

// Tokens that the phase leaves dense are gathered alone, and get a bias of their own or none.
void aPhaseLeavesTokensDense() {
    for (const bool hasDenseBias : {false, true}) {
        reset();
        Linear linear(7);
        linear.sparsifyDecode(hasDenseBias);
        EXPECT(refusal(linear).empty());
        EXPECT(
            (launches().order == std::vector<std::string>{"scratch", "mask", "product", "free"}));
        const cuda::Selection& selection = launches().masks.at(0).selection;
        EXPECT(selection.n == 16 && selection.channelOrder != nullptr);
        EXPECT(selection.shift == nullptr && selection.scoreScale == nullptr);
        EXPECT(selection.valueScale == reinterpret_cast<float*>(linear.denseScale.bytes.data()));
        EXPECT(launches().products.at(0).hasBias == hasDenseBias);
    }
    reset();
    Linear linear(1);
    linear.sparsifyDecode(true);
    EXPECT(refusal(linear).empty());
    EXPECT(launches().decodes.at(0).bias == linear.bias.bytes.data());
    EXPECT(launches().decodes.at(0).selection.n == 8);
}

// The decode kernel reads these before the kernel ahead of it has ended.
void constantsOfTheSelectionMustBeConstant() {
    for (const std::int64_t tokens : {1, 7}) {
        for (const char* name : {"shift", "score_scale", "value_scale", "channel_order"}) {
            reset();
            Linear linear(tokens);
            FakeTensor& made = std::strcmp(name, "shift") == 0         ? linear.shift
                               : std::strcmp(name, "score_scale") == 0 ? linear.scale
                               : std::strcmp(name, "value_scale") == 0 ? linear.valueScale
                                                                       : linear.order;
            made.isConstant = false;
            const std::string said = refusal(linear);
            EXPECT(says(said, name) && says(said, "must be a constant of the model"));
            EXPECT(launches().order.empty());
        }
    }
    reset();
    Linear linear(1);
    linear.w.isConstant = false;  // read after the wait
    EXPECT(refusal(linear).empty());
}

void anOrderMustBeAPermutation() {
    reset();
    Linear linear(1);
    linear.order = orderOf(false);
    EXPECT(says(refusal(linear), "channel_order[31] = 32 is out of range"));
    linear.order = tensor({kK, 1});
    EXPECT(says(refusal(linear), "channel_order has shape [32, 1]; allowed: [32]"));
}

constexpr ONNXTensorElementDataType kFLOAT = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
constexpr ONNXTensorElementDataType kHALF = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
constexpr ONNXTensorElementDataType kINT8 = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8;
constexpr ONNXTensorElementDataType kUINT4 = ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT4;

// An NMLinear of float16 whose W has integers, scales and zero points.
struct StoredLinear {
    explicit StoredLinear(StoredTypes stored = {kINT8, kHALF, kINT8}) : types(stored) {
        node.attributes = {{"n", 8}, {"m", 16}};
        node.inputs = {&x, &w, nullptr, nullptr, nullptr, nullptr, nullptr, &scale, nullptr, &zero};
    }
    std::unique_ptr<Kernel> kernel() const {
        return makeCudaLinearKernel(fakeApi(), node.info(), ElementType::kFLOAT16, types);
    }

    StoredTypes types;
    FakeTensor x{tensor({1, 1, kK}, false)};
    FakeTensor w{tensor({kK, kO})};
    FakeTensor scale{tensor({2, kO})};
    FakeTensor zero{tensor({2, kO})};
    FakeNode node;
};

// A GPU's kernels multiply floats by integers: activations that are rounded stay a CPU's.
void roundedActivationsAreRefusedBeforeTheFirstRun() {
    reset();
    StoredLinear linear;
    linear.node.attributes["activation_bits"] = 8;
    linear.node.attributes["activation_block"] = 16;
    std::string said;
    try {
        linear.kernel();
    } catch (const std::exception& fault) {
        said = fault.what();
    }
    EXPECT(says(said, "activation_bits is 8") && says(said, "--activations float"));
}

void scalesAndZeroPointsMustFitW() {
    reset();
    StoredLinear linear;
    linear.scale = tensor({3, kO});
    EXPECT(says(refusal(linear), "weight_scale [3, 48]; allowed: [1, O], or [G, O]"));
    linear.scale = tensor({4, kO});  // groups of 8
    EXPECT(says(refusal(linear), "K / G a multiple of 16"));
    linear.scale = tensor({1, kO});
    EXPECT(says(refusal(linear), "weight_zero_point has shape [2, 48]"));
    linear.node.inputs[7] = nullptr;
    EXPECT(says(refusal(linear), "weight_scale []"));
    StoredLinear nibbles({kUINT4, kFLOAT, kUINT4});
    nibbles.w = tensor({kK, 47});
    nibbles.scale = nibbles.zero = tensor({1, 47});
    EXPECT(says(refusal(nibbles), "an even O"));
    StoredLinear elements({kHALF, kFLOAT, kHALF});
    EXPECT(says(refusal(elements), "this W is of X's type"));
    EXPECT(launches().order.empty());
}

// The decode kernel reads these before the kernel ahead of it has ended.
void scalesAndZeroPointsMustBeConstant() {
    for (const bool isScale : {true, false}) {
        reset();
        StoredLinear linear;
        (isScale ? linear.scale : linear.zero).isConstant = false;
        const std::string said = refusal(linear);
        EXPECT(says(said, isScale ? "weight_scale must be" : "weight_zero_point must be"));
        EXPECT(launches().order.empty());
    }
}

void kernelsAreToldHowAWeightIsStored() {
    char scale = 0;
    char zero = 0;
    const StoredConstants constants{{2, kO}, &scale, {2, kO}, &zero};
    const auto stored = [&](StoredTypes types) {
        return storedWeights("NMLinear", ElementType::kFLOAT16, types, {kK, kO}, constants);
    };
    const cuda::StoredWeights plain = stored({kINT8, kHALF, kINT8});
    EXPECT(plain.type == cuda::WeightType::kINT8 && plain.groups == 2);
    EXPECT(plain.scale == &scale && plain.scaleIsT);
    EXPECT(plain.zeroPoint == &zero && !plain.zeroPointIsFloat);
    const cuda::StoredWeights between = stored({kUINT4, kFLOAT, kFLOAT});
    EXPECT(between.type == cuda::WeightType::kUINT4);
    EXPECT(!between.scaleIsT && between.zeroPointIsFloat);
}

struct Prune {
    FakeTensor x{tensor({5, kK}, false)};
    FakeTensor scale{tensor({kK}, false)};
    FakeNode node{{{"n", 2}, {"m", 4}}, {&x, &scale}};
    std::unique_ptr<Kernel> kernel() const {
        return makeCudaPruneKernel(fakeApi(), node.info(), ElementType::kFLOAT32);
    }
};

// The mask kernel waits as any kernel does, so scales of NMPrune may change from run to run.
void pruneTakesScalesThatChange() {
    reset();
    const Prune prune;
    EXPECT(refusal(prune).empty());
    EXPECT((launches().order == std::vector<std::string>{"mask"}));
    EXPECT(launches().masks.at(0).selection.scoreScale != nullptr);
}

}  // namespace

}  // namespace nmexport::test

int main() {
    using namespace nmexport::test;
    fewTokensNeedNoScratch();
    scratchBelongsToTheRunsStream();
    aFailedLaunchGivesScratchBack();
    missingScratchIsTold();
    denseTokensNeedNoMask();
    aPhaseLeavesTokensDense();
    constantsOfTheSelectionMustBeConstant();
    anOrderMustBeAPermutation();
    pruneTakesScalesThatChange();
    roundedActivationsAreRefusedBeforeTheFirstRun();
    scalesAndZeroPointsMustFitW();
    scalesAndZeroPointsMustBeConstant();
    kernelsAreToldHowAWeightIsStored();
    return report("ops of the CUDA provider");
}
