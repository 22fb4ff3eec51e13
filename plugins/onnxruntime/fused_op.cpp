#include "fused_op.h"

namespace nmexport {

namespace {

struct Handle {
    const OrtApi* api;
    std::unique_ptr<Kernel> kernel;
};

}  // namespace

FusedOp::FusedOp(FusedSpec spec, ElementType type)
    : OrtCustomOp{}, mSpec(std::move(spec)), mType(type) {
    version = ORT_API_VERSION;
    GetName = [](const OrtCustomOp* op) { return self(op).mSpec.name.c_str(); };
    GetExecutionProviderType = [](const OrtCustomOp* op) { return self(op).mSpec.provider; };
    GetInputTypeCount = [](const OrtCustomOp* op) {
        return self(op).mSpec.isVariadic ? 1 : self(op).mSpec.inputs.size();
    };
    GetInputType = [](const OrtCustomOp* op, std::size_t index) {
        if (self(op).mSpec.isVariadic) return ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
        const FusedInput& input = self(op).mSpec.inputs[index];
        if (input.onnx != ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED) return input.onnx;
        switch (input.type) {
            case InputType::kINT32:
                return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
            case InputType::kFLOAT32:
                return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
            default:
                return onnxType(self(op).mType);
        }
    };
    GetInputCharacteristic = [](const OrtCustomOp* op, std::size_t index) {
        if (self(op).mSpec.isVariadic) return INPUT_OUTPUT_VARIADIC;
        return self(op).mSpec.inputs[index].optional ? INPUT_OUTPUT_OPTIONAL
                                                     : INPUT_OUTPUT_REQUIRED;
    };
    GetInputMemoryType = [](const OrtCustomOp* op, std::size_t index) {
        const FusedSpec& spec = self(op).mSpec;
        return !spec.isVariadic && spec.inputs[index].isOnHost ? OrtMemTypeCPUInput
                                                               : OrtMemTypeDefault;
    };
    GetOutputTypeCount = [](const OrtCustomOp* op) { return self(op).mSpec.outputs; };
    GetOutputType = [](const OrtCustomOp* op, std::size_t) {
        return self(op).mSpec.givesIntegers ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64
                                            : onnxType(self(op).mType);
    };
    GetOutputCharacteristic = [](const OrtCustomOp* op, std::size_t) {
        return self(op).mSpec.isVariadic ? INPUT_OUTPUT_VARIADIC : INPUT_OUTPUT_REQUIRED;
    };
    GetVariadicInputMinArity = [](const OrtCustomOp*) { return 1; };
    GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 0; };
    GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
    GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 1; };
    GetStartVersion = [](const OrtCustomOp*) { return 1; };
    GetEndVersion = [](const OrtCustomOp*) { return 1; };
    CreateKernelV2 = [](const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info,
                        void** out) -> OrtStatusPtr {
        return guarded(*api, [&] {
            *out = new Handle{api, self(op).mSpec.factory(*api, info, self(op).mType)};
        });
    };
    KernelComputeV2 = [](void* raw, OrtKernelContext* context) -> OrtStatusPtr {
        const Handle* handle = static_cast<const Handle*>(raw);
        return guarded(*handle->api, [&] { handle->kernel->run(context); });
    };
    KernelDestroy = [](void* raw) { delete static_cast<Handle*>(raw); };
}

}  // namespace nmexport
