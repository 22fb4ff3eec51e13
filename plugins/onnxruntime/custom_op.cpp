#include "custom_op.h"

namespace nmexport {

ONNXTensorElementDataType onnxType(ElementType type) {
    switch (type) {
        case ElementType::kFLOAT16:
            return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
        case ElementType::kBFLOAT16:
            return ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16;
        default:
            return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    }
}

std::vector<StoredTypes> storedTypesFor(ElementType type) {
    constexpr ONNXTensorElementDataType kFLOAT = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    constexpr ONNXTensorElementDataType kFLOAT8 = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT8E4M3FN;
    std::vector<StoredTypes> stored{{onnxType(type), kFLOAT, onnxType(type)}};
    for (const ONNXTensorElementDataType weights :
         {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT4,
          ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT4, kFLOAT8}) {
        for (const ONNXTensorElementDataType scales : {kFLOAT, onnxType(type)}) {
            stored.push_back({weights, scales, weights});
            if (weights != kFLOAT8) stored.push_back({weights, scales, kFLOAT});
            if (type == ElementType::kFLOAT32) break;
        }
    }
    return stored;
}

namespace {

const CustomOp& self(const OrtCustomOp* op) {
    return *static_cast<const CustomOp*>(op);
}

ONNXTensorElementDataType inputType(const OrtCustomOp* op, std::size_t index) {
    const OpSpec& spec = self(op).spec();
    const InputType type = spec.inputs[index].type;
    if (&spec == &kNMLinear) {
        if (index == NMLinearInput::W) return self(op).stored().weights;
        if (index == NMLinearInput::weight_zero_point) return self(op).stored().zeros;
        if (index == NMLinearInput::weight_scale) return self(op).stored().scales;
    }
    switch (type) {
        case InputType::kFLOAT32:
            return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
        case InputType::kINT32:
            return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
        default:
            return onnxType(self(op).type());
    }
}

// Dimensions of an input as the graph knows them; an unknown one is -1, with a name or without.
struct GraphShape {
    ONNXTensorElementDataType type;
    std::vector<std::int64_t> dimensions;
    std::vector<const char*> names;  // owned by the context
};

GraphShape inputShape(const OrtApi& api, OrtShapeInferContext* context, std::size_t index) {
    OrtTensorTypeAndShapeInfo* info = nullptr;  // owned by the context
    check(api, api.ShapeInferContext_GetInputTypeShape(context, index, &info));
    std::size_t rank = 0;
    check(api, api.GetDimensionsCount(info, &rank));
    GraphShape shape{ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED, std::vector<std::int64_t>(rank),
                     std::vector<const char*>(rank, "")};
    check(api, api.GetTensorElementType(info, &shape.type));
    if (rank == 0) return shape;
    check(api, api.GetDimensions(info, shape.dimensions.data(), rank));
    check(api, api.GetSymbolicDimensions(info, shape.names.data(), rank));
    return shape;
}

void setOutputShape(const OrtApi& api, OrtShapeInferContext* context, GraphShape& shape) {
    OrtTensorTypeAndShapeInfo* info = nullptr;
    check(api, api.CreateTensorTypeAndShapeInfo(&info));
    const auto release = [&](OrtTensorTypeAndShapeInfo* owned) {
        api.ReleaseTensorTypeAndShapeInfo(owned);
    };
    const std::unique_ptr<OrtTensorTypeAndShapeInfo, decltype(release)> owner(info, release);
    const std::size_t rank = shape.dimensions.size();
    check(api, api.SetTensorElementType(info, shape.type));
    check(api, api.SetDimensions(info, shape.dimensions.data(), rank));
    check(api, api.SetSymbolicDimensions(info, shape.names.data(), rank));
    check(api, api.ShapeInferContext_SetOutputTypeShape(context, 0, info));
}

// X [..., K] gives Y [..., K], or Y [..., O] where there is a W [K, O]; always of X's own type,
// because ONNX Runtime asks the ops of one name in turn, whichever of them fits the node.
void inferShape(const OrtApi& api, const CustomOp& op, OrtShapeInferContext* context) {
    GraphShape shape = inputShape(api, context, 0);
    if (shape.dimensions.empty()) return;  // the rank is not known
    if (&op.spec() == &kNMLinear) {
        const GraphShape w = inputShape(api, context, NMLinearInput::W);
        const bool known = w.dimensions.size() == 2;
        shape.dimensions.back() = known ? w.dimensions.back() : -1;
        shape.names.back() = known ? w.names.back() : "";
    }
    for (std::size_t i = 0; i < shape.dimensions.size(); ++i) {
        // The C API would turn a dimension without size or name into one of size -1.
        if (shape.dimensions[i] < 0 && *shape.names[i] == '\0') return;
    }
    setOutputShape(api, context, shape);
}

// ONNX Runtime hands the kernel back without its API, so it travels in the kernel's handle.
struct Handle {
    const OrtApi* api;
    std::unique_ptr<Kernel> kernel;
};

}  // namespace

CustomOp::CustomOp(const OrtApi* api, const OpSpec& spec, ElementType type, KernelFactory factory,
                   bool infersShapes, const char* provider)
    : CustomOp(api, spec, type,
               {onnxType(type), ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, onnxType(type)},
               std::move(factory), infersShapes, provider) {}

CustomOp::CustomOp(const OrtApi* api, const OpSpec& spec, ElementType type, StoredTypes stored,
                   KernelFactory factory, bool infersShapes, const char* provider)
    : OrtCustomOp{},
      mApi(api),
      mSpec(spec),
      mType(type),
      mFactory(std::move(factory)),
      mProvider(provider),
      mStored(stored) {
    version = ORT_API_VERSION;
    GetName = [](const OrtCustomOp* op) { return self(op).spec().name; };
    GetExecutionProviderType = [](const OrtCustomOp* op) { return self(op).provider(); };
    GetInputTypeCount = [](const OrtCustomOp* op) { return self(op).spec().inputCount; };
    GetInputType = inputType;
    GetInputCharacteristic = [](const OrtCustomOp* op, std::size_t index) {
        return self(op).spec().inputs[index].optional ? INPUT_OUTPUT_OPTIONAL
                                                      : INPUT_OUTPUT_REQUIRED;
    };
    GetInputMemoryType = [](const OrtCustomOp*, std::size_t) { return OrtMemTypeDefault; };
    GetOutputTypeCount = [](const OrtCustomOp*) { return std::size_t{1}; };
    GetOutputType = [](const OrtCustomOp* op, std::size_t) { return onnxType(self(op).type()); };
    GetOutputCharacteristic = [](const OrtCustomOp*, std::size_t) { return INPUT_OUTPUT_REQUIRED; };
    GetVariadicInputMinArity = [](const OrtCustomOp*) { return 1; };
    GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 1; };
    GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
    GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 1; };
    GetStartVersion = [](const OrtCustomOp*) { return kOPSET_VERSION; };
    GetEndVersion = [](const OrtCustomOp*) { return kOPSET_VERSION; };
    CreateKernelV2 = [](const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info,
                        void** out) -> OrtStatusPtr {
        return guarded(
            *api, [&] { *out = new Handle{api, self(op).factory()(*api, info, self(op).type())}; });
    };
    KernelComputeV2 = [](void* raw, OrtKernelContext* context) -> OrtStatusPtr {
        const Handle* handle = static_cast<const Handle*>(raw);
        return guarded(*handle->api, [&] { handle->kernel->run(context); });
    };
    KernelDestroy = [](void* raw) { delete static_cast<Handle*>(raw); };
    if (!infersShapes) return;
    InferOutputShapeFn = [](const OrtCustomOp* op, OrtShapeInferContext* context) -> OrtStatusPtr {
        const OrtApi& api = *self(op).api();
        return guarded(api, [&] { inferShape(api, self(op), context); });
    };
}

}  // namespace nmexport
