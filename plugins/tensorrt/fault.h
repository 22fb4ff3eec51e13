// What is wrong with a node, in words; never leaves the library (see guarded in logging.h).
#pragma once

#include "cuda_fault.h"

namespace nmexport::trt {

using cuda::Fault;

}  // namespace nmexport::trt
