// What TensorRT finds in the library: one creator for each op of the contract.
#pragma once

#include <NvInferRuntime.h>

#include <vector>

#include "contract.h"

namespace nmexport::trt {

class NmPluginCreator : public nvinfer1::IPluginCreatorV3One {
  public:
    explicit NmPluginCreator(const OpSpec& spec);

    // Null, after a message that names node, field and value, where the fields break the contract.
    nvinfer1::IPluginV3* createPlugin(nvinfer1::AsciiChar const* name,
                                      nvinfer1::PluginFieldCollection const* fields,
                                      nvinfer1::TensorRTPhase phase) noexcept override;
    nvinfer1::PluginFieldCollection const* getFieldNames() noexcept override;
    nvinfer1::AsciiChar const* getPluginName() const noexcept override;
    nvinfer1::AsciiChar const* getPluginVersion() const noexcept override;
    nvinfer1::AsciiChar const* getPluginNamespace() const noexcept override;

  private:
    const OpSpec& mSpec;
    std::vector<nvinfer1::PluginField> mFields;
    nvinfer1::PluginFieldCollection mCollection{};
};

}  // namespace nmexport::trt
