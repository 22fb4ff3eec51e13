// NMPrune as a TensorRT plugin.
#pragma once

#include "plugin.h"

namespace nmexport::trt {

class NmPrunePlugin final : public NmPlugin {
  public:
    explicit NmPrunePlugin(Settings settings) : NmPlugin(std::move(settings)) {}

  protected:
    NmPlugin* copy() const override { return new NmPrunePlugin(*this); }
    std::size_t workspaceBytes(cuda::DType, const Shape&, std::int64_t) const override { return 0; }
    std::vector<std::int32_t> tactics(std::int64_t) const override { return {}; }
    void prepare(cuda::DType, const Shape&, std::int64_t) override {}
    void run(cuda::DType type, const Shape& x, std::int64_t outputs, const Tensors& tensors,
             void* y, void* workspace, cudaStream_t stream) override;
};

}  // namespace nmexport::trt
