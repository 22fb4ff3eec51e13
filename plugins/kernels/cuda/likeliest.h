// The choice of the next token where it is the likeliest: so that 8 bytes a sequence go to the
// host, and not all logits.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "nm_cuda.h"

namespace nmexport::cuda {

//! ids[r] is the column of the largest value of row r, the first of equals. As in NumPy's argmax, a
//! NaN is larger than any number, and zeros of both signs are equal.
struct LikeliestArgs {
    DType type{DType::kFLOAT32};
    int64_t rows{0};
    int32_t columns{0};      //!< at least 1
    void const* x{nullptr};  //!< [rows, columns]
    int64_t* ids{nullptr};   //!< [rows]; may be memory of the host that the device writes to
};

//! Enqueues it. cudaErrorInvalidValue where something is missing.
cudaError_t launchLikeliest(LikeliestArgs const& args, DeviceTraits const& device,
                            cudaStream_t stream);

}  // namespace nmexport::cuda
