// Warps: their size, the order of lanes in a butterfly, sums by shuffles.
#pragma once

#include "device_primitives.cuh"

namespace nmexport::cuda {

inline constexpr int kWARP = 32;
inline constexpr uint32_t kWHOLE_WARP = 0xffffffffU;

//! In which step of a butterfly over 8 lanes the other lane lies before this one: by the topmost
//! bit that differs.
__device__ __forceinline__ bool otherLaneIsEarlier(uint32_t step) {
    uint32_t const topBit = step >= 4 ? 4 : (step >= 2 ? 2 : 1);
    return (threadIdx.x & topBit) != 0U;
}

//! Sums of which the variance correction is made, in float64: the mean may dwarf the deviation.
struct Moments {
    double all{0};
    double allSquared{0};
    double kept{0};
    double keptSquared{0};

    __device__ void add(float z, bool isKept) {
        double const value = z;
        all += value;
        allSquared += value * value;
        kept += isKept ? value : 0.0;
        keptSquared += isKept ? value * value : 0.0;
    }

    __device__ void addMoments(Moments const& other) {
        all += other.all;
        allSquared += other.allSquared;
        kept += other.kept;
        keptSquared += other.keptSquared;
    }

    //! Over the warp, in a fixed order; every lane gets the sum.
    __device__ void reduceOverWarp() {
#pragma unroll
        for (int offset = 16; offset > 0; offset /= 2) {
            all += __shfl_xor_sync(kWHOLE_WARP, all, offset);
            allSquared += __shfl_xor_sync(kWHOLE_WARP, allSquared, offset);
            kept += __shfl_xor_sync(kWHOLE_WARP, kept, offset);
            keptSquared += __shfl_xor_sync(kWHOLE_WARP, keptSquared, offset);
        }
    }

    //! nu of the op contract.
    __device__ float correction(int32_t channels) const {
        double const meanAll = all / channels;
        double const meanKept = kept / channels;
        double const varAll = fmax(allSquared / channels - meanAll * meanAll, 0.0);
        double const varKept = fmax(keptSquared / channels - meanKept * meanKept, 0.0);
        bool const isPoisoned = isnan(allSquared) || isnan(keptSquared);
        return isPoisoned ? __int_as_float(0x7fffffff)
                          : static_cast<float>(sqrt(varAll / fmax(varKept, 1e-12)));
    }
};

}  // namespace nmexport::cuda
