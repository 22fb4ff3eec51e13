// An op of the contract for one element type, as ONNX Runtime wants it described.
#pragma once

#include <memory>

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

using KernelFactory = std::unique_ptr<Kernel> (*)(const OrtApi& api, const OrtKernelInfo* info,
                                                  ElementType type);

class CustomOp : public OrtCustomOp {
  public:
    // `api` may be null where the op is only described.
    CustomOp(const OrtApi* api, const OpSpec& spec, ElementType type, KernelFactory factory,
             bool infersShapes);

    const OrtApi* api() const { return mApi; }
    const OpSpec& spec() const { return mSpec; }
    ElementType type() const { return mType; }
    KernelFactory factory() const { return mFactory; }

  private:
    const OrtApi* mApi;
    const OpSpec& mSpec;
    ElementType mType;
    KernelFactory mFactory;
};

std::unique_ptr<Kernel> makePruneKernel(const OrtApi& api, const OrtKernelInfo* info,
                                        ElementType type);
std::unique_ptr<Kernel> makeLinearKernel(const OrtApi& api, const OrtKernelInfo* info,
                                         ElementType type);

}  // namespace nmexport
