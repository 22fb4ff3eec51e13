#include "decode_shapes.cuh"

namespace nmexport::cuda {

template cudaError_t launchDecodeOf<__half>(LinearArgs const&, DecodePlan const&,
                                            DeviceTraits const&, cudaStream_t);

}  // namespace nmexport::cuda
