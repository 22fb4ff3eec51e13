// What went wrong on a GPU, in words, as an exception of the host code. The adapters catch it at
// their framework's border.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace nmexport::cuda {

class Fault : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

// Throws Fault where a call did not succeed; `what` is the subject of the sentence.
inline void checkCuda(cudaError_t status, const char* what) {
    if (status == cudaSuccess) return;
    throw Fault(std::string(what) + " failed: " + cudaGetErrorName(status) + ", " +
                cudaGetErrorString(status));
}

}  // namespace nmexport::cuda
