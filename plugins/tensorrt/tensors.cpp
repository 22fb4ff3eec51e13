#include "tensors.h"

#include <algorithm>
#include <numeric>
#include <string>

#include "fault.h"

namespace nmexport::trt {

using nvinfer1::DataType;

namespace {

const char* typeName(DataType type) {
    switch (type) {
        case DataType::kFLOAT:
            return "float32";
        case DataType::kHALF:
            return "float16";
        case DataType::kBF16:
            return "bfloat16";
        case DataType::kINT32:
            return "int32";
        case DataType::kINT64:
            return "int64";
        case DataType::kINT8:
            return "int8";
        case DataType::kBOOL:
            return "bool";
        default:
            return "another type";
    }
}

std::string textOf(const Shape& shape) {
    std::string text = "[";
    for (std::size_t i = 0; i < shape.size(); ++i) {
        text += (i > 0 ? ", " : "") + (shape[i] < 0 ? std::string("?") : std::to_string(shape[i]));
    }
    return text + "]";
}

// Whether a size that may be unknown can be the wanted one, which may be unknown too.
bool agrees(std::int64_t size, std::int64_t wanted) {
    return size < 0 || wanted < 0 || size == wanted;
}

void checkVector(const char* name, const Shape& shape, std::int64_t size, bool orOne) {
    const bool fits =
        shape.size() == 1 && (agrees(shape[0], size) || (orOne && agrees(shape[0], 1)));
    if (!fits) {
        throw Fault(std::string("input ") + name + " has shape " + textOf(shape) +
                    "; allowed: " + (orOne ? "[1] or " : "") + textOf({size}));
    }
}

void checkChannels(const Settings& settings, const Shape& x) {
    if (x.empty()) throw Fault("input X is a scalar; allowed: [..., K]");
    const std::int64_t channels = x.back();
    if (channels >= 0 && (channels == 0 || channels % settings.m != 0)) {
        throw Fault("input X has " + std::to_string(channels) + " channels, its last axis, K in " +
                    textOf(x) + "; allowed: a positive multiple of field m, " +
                    std::to_string(settings.m));
    }
}

}  // namespace

Shape shapeOf(const nvinfer1::Dims& dims) {
    return Shape(dims.d, dims.d + dims.nbDims);
}

Shape shapeOf(const nvinfer1::DimsExprs& dims) {
    Shape shape;
    for (int i = 0; i < dims.nbDims; ++i) {
        shape.push_back(dims.d[i]->isConstant() ? dims.d[i]->getConstantValue() : -1);
    }
    return shape;
}

std::int64_t tokensOf(const Shape& x) {
    std::int64_t tokens = 1;
    for (std::size_t i = 0; i + 1 < x.size(); ++i) tokens *= x[i];
    return tokens;
}

std::int64_t sequenceOf(const Shape& x) {
    return x.size() < 2 ? 1 : x[x.size() - 2];
}

bool isElementType(DataType type) {
    return type == DataType::kFLOAT || type == DataType::kHALF || type == DataType::kBF16;
}

cuda::DType elementType(DataType type) {
    switch (type) {
        case DataType::kFLOAT:
            return cuda::DType::kFLOAT32;
        case DataType::kHALF:
            return cuda::DType::kFLOAT16;
        case DataType::kBF16:
            return cuda::DType::kBFLOAT16;
        default:
            throw Fault(std::string("input X is ") + typeName(type) +
                        "; allowed: float32, float16, bfloat16");
    }
}

std::size_t elementBytes(cuda::DType type) {
    return type == cuda::DType::kFLOAT32 ? 4 : 2;
}

DataType expectedType(const Settings& settings, int tensor, DataType x) {
    const int input = settings.inputs.at(static_cast<std::size_t>(tensor));
    switch (settings.spec->inputs[input].type) {
        case InputType::kFLOAT32:
            return DataType::kFLOAT;
        case InputType::kINT32:
            return DataType::kINT32;
        default:
            return x;
    }
}

void checkTypes(const Settings& settings, const std::vector<DataType>& types) {
    elementType(types.at(0));
    for (std::size_t i = 1; i < types.size(); ++i) {
        const DataType wanted = expectedType(settings, static_cast<int>(i), types[0]);
        if (types[i] != wanted) {
            throw Fault(std::string("input ") + settings.spec->inputs[settings.inputs.at(i)].name +
                        " is " + typeName(types[i]) + "; allowed: " + typeName(wanted) +
                        (wanted == types[0] ? ", as X is" : ""));
        }
    }
}

void checkShapes(const Settings& settings, const std::vector<Shape>& shapes) {
    const Shape& x = shapes.at(0);
    checkChannels(settings, x);
    const std::int64_t channels = x.back();
    std::int64_t outputs = -1;
    for (std::size_t i = 1; i < shapes.size(); ++i) {
        const Shape& shape = shapes[i];
        const std::string name = settings.spec->inputs[settings.inputs.at(i)].name;
        if (name == "W") {
            if (shape.size() != 2 || !agrees(shape[0], channels) || shape[1] == 0) {
                throw Fault("input W has shape " + textOf(shape) + "; allowed: [K, O] with K = " +
                            (channels < 0 ? "?" : std::to_string(channels)) + ", X's last axis");
            }
            outputs = shape[1];
        } else if (name == "bias" || name == "shift_weight" || name == "dense_bias") {
            checkVector(name.c_str(), shape, outputs, false);
        } else {
            checkVector(name.c_str(), shape, channels, name == "shift");
        }
    }
}

namespace {

// Rules between fields and inputs. Throws Fault.
void checkPresence(const Settings& settings, std::size_t tensorCount) {
    const OpSpec& spec = *settings.spec;
    if (settings.inputs.size() != tensorCount) {
        throw Fault("the node has " + std::to_string(tensorCount) +
                    " inputs; allowed: " + std::to_string(settings.inputs.size()) + ", " +
                    inputNames(spec, settings.inputs));
    }
    for (std::size_t i = 0; i < spec.inputCount; ++i) {
        if (!spec.inputs[i].optional && settings.tensorOf(static_cast<int>(i)) < 0) {
            throw Fault(std::string("input ") + spec.inputs[i].name +
                        " is missing; it is required");
        }
    }
    if (&spec != &kNMLinear) return;
    if (settings.tensorOf(NMLinearInput::weight_scale) >= 0) {
        throw Fault(
            "input weight_scale is given, which an int8 W has; allowed on a GPU: W of X's own "
            "type");
    }
    for (const int input : {NMLinearInput::dense_scale, NMLinearInput::dense_bias}) {
        if (settings.phase != Phase::kALL || settings.tensorOf(input) < 0) continue;
        throw Fault(std::string("input ") + spec.inputs[input].name +
                    " is given and field phase is \"all\"; allowed: prefill, decode");
    }
    if (!settings.dynamicShift) return;
    if (settings.tensorOf(NMLinearInput::shift) >= 0) {
        throw Fault("field dynamic_shift is 1 and input shift is given; allowed: one of the two");
    }
    if (settings.tensorOf(NMLinearInput::shift_weight) < 0) {
        throw Fault(
            "field dynamic_shift is 1 and input shift_weight is missing; required: [O], the column "
            "sums of the dense weight");
    }
}

// The first inputs of the contract, as many as there are tensors.
std::vector<int> leadingInputs(const OpSpec& spec, std::size_t tensorCount) {
    std::vector<int> inputs(std::min(tensorCount, spec.inputCount));
    std::iota(inputs.begin(), inputs.end(), 0);
    return inputs;
}

}  // namespace

void settleInputs(Settings& settings, const std::vector<DataType>& types,
                  const std::vector<Shape>& shapes) {
    const std::size_t tensorCount = std::max(types.size(), shapes.size());
    if (settings.inputs.empty()) settings.inputs = leadingInputs(*settings.spec, tensorCount);
    checkPresence(settings, tensorCount);
    if (!types.empty()) checkTypes(settings, types);
    if (!shapes.empty()) checkShapes(settings, shapes);
}

}  // namespace nmexport::trt
