#include "custom_op.h"

namespace nmexport {

namespace {

ONNXTensorElementDataType onnxType(ElementType type) {
    switch (type) {
        case ElementType::kFLOAT16: return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
        case ElementType::kBFLOAT16: return ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16;
        default: return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    }
}

const CustomOp& self(const OrtCustomOp* op) { return *static_cast<const CustomOp*>(op); }

ONNXTensorElementDataType inputType(const OrtCustomOp* op, std::size_t index) {
    switch (self(op).spec().inputs[index].type) {
        case InputType::kFLOAT32: return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
        case InputType::kINT32: return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
        default: return onnxType(self(op).type());
    }
}

// ONNX Runtime hands the kernel back without its API, so it travels in the kernel's handle.
struct Handle {
    const OrtApi* api;
    std::unique_ptr<Kernel> kernel;
};

}  // namespace

CustomOp::CustomOp(const OpSpec& spec, ElementType type, KernelFactory factory)
    : OrtCustomOp{}, mSpec(spec), mType(type), mFactory(factory) {
    version = ORT_API_VERSION;
    GetName = [](const OrtCustomOp* op) { return self(op).spec().name; };
    GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };  // CPU
    GetInputTypeCount = [](const OrtCustomOp* op) { return self(op).spec().inputCount; };
    GetInputType = inputType;
    GetInputCharacteristic = [](const OrtCustomOp* op, std::size_t index) {
        return self(op).spec().inputs[index].optional ? INPUT_OUTPUT_OPTIONAL
                                                      : INPUT_OUTPUT_REQUIRED;
    };
    GetInputMemoryType = [](const OrtCustomOp*, std::size_t) { return OrtMemTypeDefault; };
    GetOutputTypeCount = [](const OrtCustomOp*) { return std::size_t{1}; };
    GetOutputType = [](const OrtCustomOp* op, std::size_t) { return onnxType(self(op).type()); };
    GetOutputCharacteristic = [](const OrtCustomOp*, std::size_t) {
        return INPUT_OUTPUT_REQUIRED;
    };
    GetVariadicInputMinArity = [](const OrtCustomOp*) { return 1; };
    GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 1; };
    GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
    GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 1; };
    GetStartVersion = [](const OrtCustomOp*) { return kOPSET_VERSION; };
    GetEndVersion = [](const OrtCustomOp*) { return kOPSET_VERSION; };
    CreateKernelV2 = [](const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info,
                        void** out) -> OrtStatusPtr {
        return guarded(*api, [&] {
            *out = new Handle{api, self(op).factory()(*api, info, self(op).type())};
        });
    };
    KernelComputeV2 = [](void* raw, OrtKernelContext* context) -> OrtStatusPtr {
        const Handle* handle = static_cast<const Handle*>(raw);
        return guarded(*handle->api, [&] { handle->kernel->run(context); });
    };
    KernelDestroy = [](void* raw) { delete static_cast<Handle*>(raw); };
}

}  // namespace nmexport
