// From run-time values to compiled shapes for stored rows, one kind of storage per translation
// unit.
#pragma once

#include "element.cuh"
#include "stored.h"

namespace nmexport::cuda {

//! What kernels are compiled for. kINT4 is signed or not, as a value of the launch says.
enum class Storage { kINT8, kINT4, kFLOAT8 };

//! Whether a lane of such a shape reads 8 bytes of a row at a time, and not 16.
constexpr bool hasHalfVectors(Storage storage, int tokens, int unroll) {
    return storage == Storage::kINT4 && tokens == 1 && unroll == 8;
}

//! What a launch is given, worked out on the host.
struct StoredArgs {
    LinearArgs linear;
    TokenCorrections corrections;
    int32_t groupShift;  //!< a group has 1 << groupShift channels; all of them where G is 1
    bool isDense;        //!< all rows are kept: the first are known before x is
};

//! Launches the compiled shape of a plan; defined for __half and __nv_bfloat16 and every Storage in
//! stored_<storage>.cu.
template <typename T, Storage STORAGE>
cudaError_t launchStoredOf(StoredArgs const& args, DecodePlan const& plan,
                           DeviceTraits const& device, cudaStream_t stream);

}  // namespace nmexport::cuda
