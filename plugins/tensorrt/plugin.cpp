#include "plugin.h"

#include <algorithm>
#include <memory>

#include "fault.h"
#include "logging.h"

namespace nmexport::trt {

using namespace nvinfer1;

namespace {

std::vector<Shape> runtimeShapes(const PluginTensorDesc* descriptions, std::int32_t count) {
    std::vector<Shape> shapes;
    for (std::int32_t i = 0; i < count; ++i) shapes.push_back(trt::shapeOf(descriptions[i].dims));
    return shapes;
}

std::vector<Shape> maximumShapes(const DynamicPluginTensorDesc* descriptions, std::int32_t count) {
    std::vector<Shape> shapes;
    for (std::int32_t i = 0; i < count; ++i) shapes.push_back(trt::shapeOf(descriptions[i].max));
    return shapes;
}

std::vector<DataType> typesOf(const DynamicPluginTensorDesc* descriptions, std::int32_t count) {
    std::vector<DataType> types;
    for (std::int32_t i = 0; i < count; ++i) types.push_back(descriptions[i].desc.type);
    return types;
}

}  // namespace

template <typename Result, typename Body>
Result NmPlugin::fenced(Result fallback, const Body& body) const noexcept {
    return guarded(mSettings.spec->name, mSettings.node.c_str(), fallback, body);
}

template <typename Body>
std::int32_t NmPlugin::succeeds(const Body& body) const noexcept {
    return fenced(std::int32_t{-1}, [&] {
        body();
        return std::int32_t{0};
    });
}

// --- core --------------------------------------------------------------------------------------

IPluginCapability* NmPlugin::getCapabilityInterface(PluginCapabilityType type) noexcept {
    switch (type) {
        case PluginCapabilityType::kCORE:
            return static_cast<IPluginV3OneCore*>(this);
        case PluginCapabilityType::kBUILD:
            return static_cast<IPluginV3OneBuild*>(this);
        case PluginCapabilityType::kRUNTIME:
            return static_cast<IPluginV3OneRuntime*>(this);
    }
    return nullptr;
}

IPluginV3* NmPlugin::clone() noexcept {
    return fenced(static_cast<IPluginV3*>(nullptr),
                  [&] { return static_cast<IPluginV3*>(copy()); });
}

AsciiChar const* NmPlugin::getPluginName() const noexcept {
    return mSettings.spec->name;
}

AsciiChar const* NmPlugin::getPluginVersion() const noexcept {
    return kPLUGIN_VERSION;
}

AsciiChar const* NmPlugin::getPluginNamespace() const noexcept {
    return kPLUGIN_NAMESPACE;
}

// --- build -------------------------------------------------------------------------------------

std::int32_t NmPlugin::getOutputDataTypes(DataType* outputs, std::int32_t outputCount,
                                          DataType const* inputs,
                                          std::int32_t inputCount) const noexcept {
    return succeeds([&] {
        if (outputCount != 1) throw Fault("the node must have one output");
        Settings settled = mSettings;
        settleInputs(settled, std::vector<DataType>(inputs, inputs + inputCount), {});
        outputs[0] = inputs[0];
    });
}

std::int32_t NmPlugin::getOutputShapes(DimsExprs const* inputs, std::int32_t inputCount,
                                       DimsExprs const*, std::int32_t, DimsExprs* outputs,
                                       std::int32_t outputCount, IExprBuilder&) noexcept {
    return succeeds([&] {
        if (outputCount != 1) throw Fault("the node must have one output");
        std::vector<Shape> shapes;
        for (std::int32_t i = 0; i < inputCount; ++i) shapes.push_back(trt::shapeOf(inputs[i]));
        settleInputs(mSettings, {}, shapes);
        outputs[0] = inputs[0];
        if (mSettings.spec == &kNMLinear) {
            const int w = mSettings.tensorOf(NMLinearInput::W);
            outputs[0].d[outputs[0].nbDims - 1] = inputs[w].d[1];
        }
    });
}

bool NmPlugin::supportsFormatCombination(std::int32_t position,
                                         DynamicPluginTensorDesc const* tensors,
                                         std::int32_t inputCount, std::int32_t) noexcept {
    return fenced(false, [&] {
        if (static_cast<std::size_t>(inputCount) != mSettings.inputs.size()) return false;
        const PluginTensorDesc& asked = tensors[position].desc;
        if (asked.format != TensorFormat::kLINEAR) return false;
        const DataType x = tensors[0].desc.type;
        if (position == 0) return isElementType(x);
        return asked.type == (position < inputCount ? expectedType(mSettings, position, x) : x);
    });
}

std::int32_t NmPlugin::configurePlugin(DynamicPluginTensorDesc const* inputs,
                                       std::int32_t inputCount, DynamicPluginTensorDesc const*,
                                       std::int32_t) noexcept {
    return succeeds([&] {
        settleInputs(mSettings, typesOf(inputs, inputCount), maximumShapes(inputs, inputCount));
        mMinTokens = std::max<std::int64_t>(1, tokensOf(trt::shapeOf(inputs[0].min)));
    });
}

std::size_t NmPlugin::getWorkspaceSize(DynamicPluginTensorDesc const* inputs,
                                       std::int32_t inputCount, DynamicPluginTensorDesc const*,
                                       std::int32_t) const noexcept {
    return fenced(std::size_t{0}, [&] {
        const std::vector<Shape> shapes = maximumShapes(inputs, inputCount);
        return workspaceBytes(elementType(inputs[0].desc.type), shapes.at(0), outputsOf(shapes));
    });
}

std::int32_t NmPlugin::getNbTactics() noexcept {
    return fenced(std::int32_t{0},
                  [&] { return static_cast<std::int32_t>(tactics(mMinTokens).size()); });
}

std::int32_t NmPlugin::getValidTactics(std::int32_t* valid, std::int32_t count) noexcept {
    return succeeds([&] {
        const std::vector<std::int32_t> offered = tactics(mMinTokens);
        if (static_cast<std::size_t>(std::max(count, 0)) < offered.size()) {
            throw Fault("there is room for " + std::to_string(count) + " tactics of " +
                        std::to_string(offered.size()));
        }
        std::copy(offered.begin(), offered.end(), valid);
    });
}

char const* NmPlugin::getTimingCacheID() noexcept {
    return fenced(static_cast<char const*>(nullptr), [&] {
        mTimingCacheId = mSettings.signature();
        return mTimingCacheId.c_str();
    });
}

// --- runtime -----------------------------------------------------------------------------------

std::int32_t NmPlugin::setTactic(std::int32_t tactic) noexcept {
    mTactic = tactic;
    return 0;
}

std::int32_t NmPlugin::onShapeChange(PluginTensorDesc const* inputs, std::int32_t inputCount,
                                     PluginTensorDesc const*, std::int32_t) noexcept {
    return succeeds([&] {
        const std::vector<Shape> shapes = runtimeShapes(inputs, inputCount);
        std::vector<DataType> types;
        for (std::int32_t i = 0; i < inputCount; ++i) types.push_back(inputs[i].type);
        settleInputs(mSettings, types, shapes);
        if (mDevice.computeCapability == 0) learnDevice();  // timed without a context by a builder
        prepare(elementType(inputs[0].type), shapes.at(0), outputsOf(shapes));
    });
}

std::int32_t NmPlugin::enqueue(PluginTensorDesc const* inputs, PluginTensorDesc const*,
                               void const* const* inputData, void* const* outputData,
                               void* workspace, cudaStream_t stream) noexcept {
    return succeeds([&] {
        const auto count = static_cast<std::int32_t>(mSettings.inputs.size());
        const std::vector<Shape> shapes = runtimeShapes(inputs, count);
        if (tokensOf(shapes.at(0)) == 0) return;  // nothing to compute
        run(elementType(inputs[0].type), shapes[0], outputsOf(shapes),
            Tensors(mSettings, inputs, inputData), outputData[0], workspace, stream);
    });
}

IPluginV3* NmPlugin::attachToContext(IPluginResourceContext*) noexcept {
    return fenced(static_cast<IPluginV3*>(nullptr), [&] {
        std::unique_ptr<NmPlugin> attached(copy());
        attached->learnDevice();
        return static_cast<IPluginV3*>(attached.release());
    });
}

PluginFieldCollection const* NmPlugin::getFieldsToSerialize() noexcept {
    return fenced(static_cast<PluginFieldCollection const*>(nullptr),
                  [&] { return mPlanFields.write(mSettings); });
}

void NmPlugin::learnDevice() {
    cuda::DeviceTraits traits;
    cuda::checkCuda(cuda::queryDevice(&traits), "asking the device what it is");
    mDevice = traits;
}

std::int64_t NmPlugin::outputsOf(const std::vector<Shape>& shapes) const {
    const int w = mSettings.spec == &kNMLinear ? mSettings.tensorOf(NMLinearInput::W) : -1;
    return w < 0 ? shapes.at(0).back() : shapes.at(static_cast<std::size_t>(w)).back();
}

}  // namespace nmexport::trt
