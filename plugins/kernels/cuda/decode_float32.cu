#include "decode_shapes.cuh"

namespace nmexport::cuda {

template cudaError_t launchDecodeOf<float>(DecodeArgs const&, DecodePlan const&,
                                           DeviceTraits const&, cudaStream_t);

}  // namespace nmexport::cuda
