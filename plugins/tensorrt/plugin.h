// What NMPrune and NMLinear share: everything that TensorRT asks of a plugin but the work itself.
#pragma once

#include <NvInferRuntime.h>

#include <vector>

#include "nm_cuda.h"
#include "settings.h"
#include "tensors.h"

namespace nmexport::trt {

// The tensors of one run, by their position in the contract.
class Tensors {
  public:
    Tensors(const Settings& settings, const nvinfer1::PluginTensorDesc* descriptions,
            const void* const* data)
        : mSettings(settings), mDescriptions(descriptions), mData(data) {}

    // Null where the input is absent.
    template <typename T = void>
    const T* data(int input) const {
        const int tensor = mSettings.tensorOf(input);
        return tensor < 0 ? nullptr : static_cast<const T*>(mData[tensor]);
    }
    // Length of a vector; 0 where the input is absent.
    std::int32_t length(int input) const {
        const int tensor = mSettings.tensorOf(input);
        return tensor < 0 ? 0 : static_cast<std::int32_t>(mDescriptions[tensor].dims.d[0]);
    }

  private:
    const Settings& mSettings;
    const nvinfer1::PluginTensorDesc* mDescriptions;
    const void* const* mData;
};

// One node. TensorRT owns it: made with new, ended by its own virtual destructor.
//
// shift, score_scale and channel_order must be constants of the network, the last a permutation
// (see Selection in nm_cuda.h). TensorRT shows a plugin types and shapes, never whether an input is
// constant, and values only as device memory at enqueue, where reading them would wait for the
// device. So the export checks its files (nmexport/graph/checks.py), and nothing is checked here.
class NmPlugin : public nvinfer1::IPluginV3,
                 public nvinfer1::IPluginV3OneCore,
                 public nvinfer1::IPluginV3OneBuild,
                 public nvinfer1::IPluginV3OneRuntime {
  public:
    // Core.
    nvinfer1::IPluginCapability* getCapabilityInterface(
        nvinfer1::PluginCapabilityType type) noexcept final;
    nvinfer1::IPluginV3* clone() noexcept final;
    nvinfer1::AsciiChar const* getPluginName() const noexcept final;
    nvinfer1::AsciiChar const* getPluginVersion() const noexcept final;
    nvinfer1::AsciiChar const* getPluginNamespace() const noexcept final;

    // Build.
    std::int32_t getNbOutputs() const noexcept final { return 1; }
    std::int32_t getOutputDataTypes(nvinfer1::DataType* outputs, std::int32_t outputCount,
                                    nvinfer1::DataType const* inputs,
                                    std::int32_t inputCount) const noexcept final;
    std::int32_t getOutputShapes(nvinfer1::DimsExprs const* inputs, std::int32_t inputCount,
                                 nvinfer1::DimsExprs const* shapeInputs,
                                 std::int32_t shapeInputCount, nvinfer1::DimsExprs* outputs,
                                 std::int32_t outputCount,
                                 nvinfer1::IExprBuilder& builder) noexcept final;
    bool supportsFormatCombination(std::int32_t position,
                                   nvinfer1::DynamicPluginTensorDesc const* tensors,
                                   std::int32_t inputCount,
                                   std::int32_t outputCount) noexcept final;
    std::int32_t configurePlugin(nvinfer1::DynamicPluginTensorDesc const* inputs,
                                 std::int32_t inputCount,
                                 nvinfer1::DynamicPluginTensorDesc const* outputs,
                                 std::int32_t outputCount) noexcept final;
    std::size_t getWorkspaceSize(nvinfer1::DynamicPluginTensorDesc const* inputs,
                                 std::int32_t inputCount,
                                 nvinfer1::DynamicPluginTensorDesc const* outputs,
                                 std::int32_t outputCount) const noexcept final;
    std::int32_t getNbTactics() noexcept final;
    std::int32_t getValidTactics(std::int32_t* tactics, std::int32_t count) noexcept final;
    char const* getTimingCacheID() noexcept final;

    // Runtime.
    std::int32_t setTactic(std::int32_t tactic) noexcept final;
    std::int32_t onShapeChange(nvinfer1::PluginTensorDesc const* inputs, std::int32_t inputCount,
                               nvinfer1::PluginTensorDesc const* outputs,
                               std::int32_t outputCount) noexcept final;
    std::int32_t enqueue(nvinfer1::PluginTensorDesc const* inputs,
                         nvinfer1::PluginTensorDesc const* outputs, void const* const* inputData,
                         void* const* outputData, void* workspace,
                         cudaStream_t stream) noexcept final;
    nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext* context) noexcept final;
    nvinfer1::PluginFieldCollection const* getFieldsToSerialize() noexcept final;

  protected:
    explicit NmPlugin(Settings settings) : mSettings(std::move(settings)) {}
    NmPlugin(const NmPlugin& other)
        : mSettings(other.mSettings),
          mTactic(other.mTactic),
          mMinTokens(other.mMinTokens),
          mDevice(other.mDevice) {}
    NmPlugin& operator=(const NmPlugin&) = delete;

    const Settings& settings() const { return mSettings; }
    const cuda::DeviceTraits& device() const { return mDevice; }
    std::int32_t tactic() const { return mTactic; }

    // The work; each may throw, none is called where the tensors break the contract.

    virtual NmPlugin* copy() const = 0;
    // Bytes for the most tokens that `x` stands for.
    virtual std::size_t workspaceBytes(cuda::DType type, const Shape& x,
                                       std::int64_t outputs) const = 0;
    // Ways to compute for these numbers of tokens, all with the same result.
    virtual std::vector<std::int32_t> tactics(std::int64_t minTokens) const = 0;
    // Called on the host, outside of any capture, before runs of a new shape.
    virtual void prepare(cuda::DType type, const Shape& x, std::int64_t outputs) = 0;
    // Enqueues; neither allocates nor synchronises.
    virtual void run(cuda::DType type, const Shape& x, std::int64_t outputs, const Tensors& tensors,
                     void* y, void* workspace, cudaStream_t stream) = 0;

  private:
    // What a body of a method that TensorRT calls returns; the fallback after a message.
    template <typename Result, typename Body>
    Result fenced(Result fallback, const Body& body) const noexcept;
    // Runs such a body; 0, or -1 after a message.
    template <typename Body>
    std::int32_t succeeds(const Body& body) const noexcept;
    // Fills mDevice with what the current device is. Throws Fault.
    void learnDevice();
    // O, or K for an op without W.
    std::int64_t outputsOf(const std::vector<Shape>& shapes) const;

    Settings mSettings;
    std::int32_t mTactic{0};
    std::int64_t mMinTokens{1};
    cuda::DeviceTraits mDevice{};
    std::string mTimingCacheId;
    PlanFields mPlanFields;
};

}  // namespace nmexport::trt
