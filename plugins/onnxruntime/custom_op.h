// An op of the contract for one element type, as ONNX Runtime wants it described.
#pragma once

#include <functional>
#include <memory>
#include <tuple>

#include "contract.h"
#include "element.h"
#include "ort_api.h"

namespace nmexport {

// A node ready to run. Run may be called from several threads at once.
class Kernel {
  public:
    virtual ~Kernel() = default;
    // Throws Fault where inputs do not fit each other.
    virtual void run(OrtKernelContext* context) const = 0;
};

using KernelFactory = std::function<std::unique_ptr<Kernel>(
    const OrtApi& api, const OrtKernelInfo* info, ElementType type)>;

class CustomOp : public OrtCustomOp {
  public:
    // `api` may be null where the op is only described; `provider` null is the CPU's.
    CustomOp(const OrtApi* api, const OpSpec& spec, ElementType type, KernelFactory factory,
             bool infersShapes, const char* provider = nullptr, bool hasInt8Weights = false);

    const OrtApi* api() const { return mApi; }
    const OpSpec& spec() const { return mSpec; }
    ElementType type() const { return mType; }
    const KernelFactory& factory() const { return mFactory; }
    const char* provider() const { return mProvider; }
    bool hasInt8Weights() const { return mHasInt8Weights; }

  private:
    const OrtApi* mApi;
    const OpSpec& mSpec;
    ElementType mType;
    KernelFactory mFactory;
    const char* mProvider;
    bool mHasInt8Weights;
};

// What a session says of itself in its configuration.
struct SessionSettings {
    std::size_t threads;
    bool hugePages;  // weights are copied into them

    friend bool operator<(const SessionSettings& a, const SessionSettings& b) {
        return std::tie(a.threads, a.hugePages) < std::tie(b.threads, b.hugePages);
    }
};

std::unique_ptr<Kernel> makePruneKernel(const OrtApi& api, const OrtKernelInfo* info,
                                        ElementType type, const SessionSettings& settings);
std::unique_ptr<Kernel> makeLinearKernel(const OrtApi& api, const OrtKernelInfo* info,
                                         ElementType type, const SessionSettings& settings);
// The same with weights in int8.
std::unique_ptr<Kernel> makeInt8LinearKernel(const OrtApi& api, const OrtKernelInfo* info,
                                             ElementType type, const SessionSettings& settings);

#if defined(NMEXPORT_HAS_CUDA)
inline constexpr const char* kCUDA_PROVIDER = "CUDAExecutionProvider";
std::unique_ptr<Kernel> makeCudaPruneKernel(const OrtApi& api, const OrtKernelInfo* info,
                                            ElementType type);
std::unique_ptr<Kernel> makeCudaLinearKernel(const OrtApi& api, const OrtKernelInfo* info,
                                             ElementType type);
#endif

}  // namespace nmexport
