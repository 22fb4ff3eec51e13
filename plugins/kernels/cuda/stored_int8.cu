#include "stored_shapes.cuh"

namespace nmexport::cuda {

template cudaError_t launchStoredOf<__half, Storage::kINT8>(StoredArgs const&, DecodePlan const&,
                                                            DeviceTraits const&, cudaStream_t);
template cudaError_t launchStoredOf<__nv_bfloat16, Storage::kINT8>(StoredArgs const&,
                                                                   DecodePlan const&,
                                                                   DeviceTraits const&,
                                                                   cudaStream_t);

}  // namespace nmexport::cuda
