#include "likeliest.h"

#include "device_primitives.cuh"
#include "element.cuh"

namespace nmexport::cuda {
namespace {

constexpr int kTHREADS = 1024;  // of the one block that a row gets: 128 KB take it some 2 us
constexpr int kWARP = 32;
constexpr int kWARPS = kTHREADS / kWARP;
constexpr unsigned kWHOLE_WARP = 0xffffffffU;
constexpr uint32_t kSIGN = 1U << 31;

//! A whole number that is ordered as the values are, NaN last.
__device__ __forceinline__ uint32_t rankOf(float value) {
    if (isnan(value)) {
        return 0xffffffffU;
    }
    uint32_t const bits = __float_as_uint(value + 0.0F);  // minus zero becomes zero
    return bits & kSIGN ? ~bits : bits | kSIGN;
}

//! The best so far of one thread, which sees its columns in order: the first of equals stays.
struct Best {
    uint32_t rank{0};
    uint32_t column{0};

    __device__ void offer(float value, uint32_t at) {
        uint32_t const other = rankOf(value);
        if (other > rank) {
            rank = other;
            column = at;
        }
    }

    //! Larger where the rank is, and of equals where the column is smaller.
    __device__ uint64_t word() const { return static_cast<uint64_t>(rank) << 32 | ~column; }
};

__device__ __forceinline__ uint64_t bestOfWarp(uint64_t word) {
#pragma unroll
    for (int offset = kWARP / 2; offset > 0; offset /= 2) {
        uint64_t const other = __shfl_xor_sync(kWHOLE_WARP, word, offset);
        word = other > word ? other : word;
    }
    return word;
}

//! 16 bytes that the kernel before wrote, perhaps while this one was already resident.
template <typename T>
__device__ __forceinline__ Unpacked<T> loadVector(T const* from) {
    uint4 raw;
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(raw.x), "=r"(raw.y), "=r"(raw.z), "=r"(raw.w)
                 : "l"(from));
    return unpack(raw, from);
}

//! A block a row; `VECTOR` elements at a time, which the row begins at a multiple of.
template <typename T, int VECTOR>
__global__ void __launch_bounds__(kTHREADS) likeliestKernel(LikeliestArgs const args) {
    __shared__ uint64_t perWarp[kWARPS];
    allowDependentLaunch();
    waitForPredecessors();
    T const* const row =
        static_cast<T const*>(args.x) + static_cast<int64_t>(blockIdx.x) * args.columns;
    Best best;
#pragma unroll 4
    for (int32_t column = static_cast<int32_t>(threadIdx.x) * VECTOR; column < args.columns;
         column += kTHREADS * VECTOR) {
        if constexpr (VECTOR == 1) {
            best.offer(loadActivation(row + column), static_cast<uint32_t>(column));
        } else {
            Unpacked<T> const values = loadVector(row + column);
#pragma unroll
            for (int i = 0; i < VECTOR; ++i) {
                best.offer(values.value[i], static_cast<uint32_t>(column + i));
            }
        }
    }
    uint64_t word = bestOfWarp(best.word());
    if (threadIdx.x % kWARP == 0) {
        perWarp[threadIdx.x / kWARP] = word;
    }
    __syncthreads();
    if (threadIdx.x < kWARP) {
        word = bestOfWarp(perWarp[threadIdx.x]);
        if (threadIdx.x == 0) {
            args.ids[blockIdx.x] = static_cast<int64_t>(~static_cast<uint32_t>(word));
        }
    }
}

template <typename T, int VECTOR>
cudaError_t enqueue(LikeliestArgs const& args, DeviceTraits const& device, cudaStream_t stream) {
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(args.rows));
    config.blockDim = dim3(kTHREADS);
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = device.computeCapability >= 90 ? 1U : 0U;
    return cudaLaunchKernelEx(&config, likeliestKernel<T, VECTOR>, args);
}

template <typename T>
cudaError_t enqueue(LikeliestArgs const& args, DeviceTraits const& device, cudaStream_t stream) {
    bool const isWhole =
        args.columns % kVECTOR<T> == 0 && reinterpret_cast<uintptr_t>(args.x) % sizeof(uint4) == 0;
    return isWhole ? enqueue<T, kVECTOR<T>>(args, device, stream)
                   : enqueue<T, 1>(args, device, stream);
}

}  // namespace

cudaError_t launchLikeliest(LikeliestArgs const& args, DeviceTraits const& device,
                            cudaStream_t stream) {
    constexpr int64_t kMOST_ROWS = INT32_MAX;
    if (args.x == nullptr || args.ids == nullptr || args.columns < 1 || args.rows < 0 ||
        args.rows > kMOST_ROWS) {
        return cudaErrorInvalidValue;
    }
    if (args.rows == 0) {
        return cudaSuccess;
    }
    switch (args.type) {
        case DType::kFLOAT32:
            return enqueue<float>(args, device, stream);
        case DType::kFLOAT16:
            return enqueue<__half>(args, device, stream);
        case DType::kBFLOAT16:
            return enqueue<__nv_bfloat16>(args, device, stream);
    }
    return cudaErrorInvalidValue;
}

}  // namespace nmexport::cuda
