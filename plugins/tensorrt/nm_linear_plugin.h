// NMLinear as a TensorRT plugin: which kernels run is the executor's business.
#pragma once

#include "linear_executor.h"
#include "plugin.h"

namespace nmexport::trt {

// Numbers of tactics; part of a plan and of the timing cache, so they keep their meaning.
inline constexpr std::int32_t kTACTIC_BY_TOKENS = 1;  // the decode kernel where it is faster
inline constexpr std::int32_t kTACTIC_PRODUCT = 2;    // mask and product even for few tokens

class NmLinearPlugin final : public NmPlugin {
  public:
    explicit NmLinearPlugin(Settings settings) : NmPlugin(std::move(settings)) {}

  protected:
    // A copy starts with no products of its own: they belong to one execution context.
    NmLinearPlugin(const NmLinearPlugin& other) : NmPlugin(other) {}
    NmPlugin* copy() const override { return new NmLinearPlugin(*this); }
    std::size_t workspaceBytes(cuda::DType type, const Shape& x,
                               std::int64_t outputs) const override;
    std::vector<std::int32_t> tactics(std::int64_t minTokens) const override;
    void prepare(cuda::DType type, const Shape& x, std::int64_t outputs) override;
    void run(cuda::DType type, const Shape& x, std::int64_t outputs, const Tensors& tensors,
             void* y, void* workspace, cudaStream_t stream) override;

  private:
    // What is known without any tensor's data.
    cuda::LinearArgs describedBy(cuda::DType type, const Shape& x, std::int64_t outputs) const;
    cuda::LinearPath path() const;
    // The input that is added to outputs of this X: one for each side of the phase.
    int biasOf(const Shape& x) const;

    cuda::LinearExecutor mExecutor;
};

}  // namespace nmexport::trt
