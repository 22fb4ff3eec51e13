// An op of the contract for one element type, as ONNX Runtime wants it described.
#pragma once

#include <functional>
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

using KernelFactory = std::function<std::unique_ptr<Kernel>(
    const OrtApi& api, const OrtKernelInfo* info, ElementType type)>;

// How ONNX Runtime names the types of the inputs W, weight_scale and weight_zero_point.
struct StoredTypes {
    ONNXTensorElementDataType weights;
    ONNXTensorElementDataType scales;
    ONNXTensorElementDataType zeros;
};

ONNXTensorElementDataType onnxType(ElementType type);
// Those that go with an element type, W of that type first; each is an op of its own.
std::vector<StoredTypes> storedTypesFor(ElementType type);

class CustomOp : public OrtCustomOp {
  public:
    // `api` may be null where the op is only described; `provider` null is the CPU's.
    CustomOp(const OrtApi* api, const OpSpec& spec, ElementType type, KernelFactory factory,
             bool infersShapes, const char* provider = nullptr);
    // With weights of another type than X.
    CustomOp(const OrtApi* api, const OpSpec& spec, ElementType type, StoredTypes stored,
             KernelFactory factory, bool infersShapes, const char* provider = nullptr);

    const OrtApi* api() const { return mApi; }
    const OpSpec& spec() const { return mSpec; }
    ElementType type() const { return mType; }
    const KernelFactory& factory() const { return mFactory; }
    const char* provider() const { return mProvider; }
    const StoredTypes& stored() const { return mStored; }

  private:
    const OrtApi* mApi;
    const OpSpec& mSpec;
    ElementType mType;
    KernelFactory mFactory;
    const char* mProvider;
    StoredTypes mStored;
};

#if defined(NMEXPORT_HAS_CUDA)
inline constexpr const char* kCUDA_PROVIDER = "CUDAExecutionProvider";
// Integers and 8-bit floats meet an X of 16 bits.
inline bool cudaTakes(ElementType type, const StoredTypes& stored) {
    return type != ElementType::kFLOAT32 || stored.weights == onnxType(type);
}
std::unique_ptr<Kernel> makeCudaPruneKernel(const OrtApi& api, const OrtKernelInfo* info,
                                            ElementType type);
std::unique_ptr<Kernel> makeCudaLinearKernel(const OrtApi& api, const OrtKernelInfo* info,
                                             ElementType type, StoredTypes stored);
#endif

}  // namespace nmexport
