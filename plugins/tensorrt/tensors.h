// Types and shapes of a node's tensors, checked against the contract.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <vector>

#include "nm_cuda.h"
#include "settings.h"

namespace nmexport::trt {

// Sizes of a tensor; -1 where a size is not known before the run.
using Shape = std::vector<std::int64_t>;

Shape shapeOf(const nvinfer1::Dims& dims);
Shape shapeOf(const nvinfer1::DimsExprs& dims);

// Product of all sizes but the last; 1 for a vector. Sizes must be known.
std::int64_t tokensOf(const Shape& x);
// The second-to-last size; 1 for a vector.
std::int64_t sequenceOf(const Shape& x);

// The kernels' name of a type. Throws Fault where they have none.
cuda::DType elementType(nvinfer1::DataType type);
bool isElementType(nvinfer1::DataType type);
std::size_t elementBytes(cuda::DType type);

// The type that a tensor must have where X has `x`.
nvinfer1::DataType expectedType(const Settings& settings, int tensor, nvinfer1::DataType x);

// Throws Fault: input, type, what is allowed.
void checkTypes(const Settings& settings, const std::vector<nvinfer1::DataType>& types);

// Checks what is known of the shapes. Throws Fault: input, shape, what is allowed.
void checkShapes(const Settings& settings, const std::vector<Shape>& shapes);

// Takes the first inputs of the contract where the node did not name its own, then checks them all
// as far as they are known; `types` or `shapes` may be empty. Throws Fault.
void settleInputs(Settings& settings, const std::vector<nvinfer1::DataType>& types,
                  const std::vector<Shape>& shapes);

}  // namespace nmexport::trt
