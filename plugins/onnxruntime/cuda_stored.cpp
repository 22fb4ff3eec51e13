#include "cuda_stored.h"

#include "stored_shapes.h"

namespace nmexport {

namespace {

cuda::WeightType weightType(ONNXTensorElementDataType type) {
    switch (type) {
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8:
            return cuda::WeightType::kINT8;
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT4:
            return cuda::WeightType::kINT4;
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT4:
            return cuda::WeightType::kUINT4;
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT8E4M3FN:
            return cuda::WeightType::kFLOAT8;
        default:
            return cuda::WeightType::kT;
    }
}

}  // namespace

cuda::StoredWeights storedWeights(const char* op, ElementType type, const StoredTypes& types,
                                  const Shape& w, const StoredConstants& constants) {
    cuda::StoredWeights stored;
    stored.type = weightType(types.weights);
    if (stored.type == cuda::WeightType::kT) {
        if (constants.scale == nullptr && constants.zero == nullptr) return stored;
        throw Fault(std::string(op) +
                    ": weight_scale and weight_zero_point go with a W of integers or 8-bit floats; "
                    "this W is of X's type");
    }
    const bool isNibbles =
        stored.type == cuda::WeightType::kINT4 || stored.type == cuda::WeightType::kUINT4;
    checkStored(op, w, constants.scales, constants.zero == nullptr ? nullptr : &constants.zeros,
                isNibbles);
    stored.groups = static_cast<std::int32_t>(constants.scales[0]);
    stored.scale = constants.scale;
    stored.scaleIsT = types.scales == onnxType(type);
    stored.zeroPoint = constants.zero;
    stored.zeroPointIsFloat = types.zeros == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    return stored;
}

}  // namespace nmexport
