// A kernel that is never launched, and tells which architecture the library's code for this device
// was compiled for.
#pragma once

#include "nm_cuda.h"

namespace nmexport::cuda {

//! For cudaFuncGetAttributes; all sources of the library are compiled for the same architectures.
void const* architectureProbe();

}  // namespace nmexport::cuda
