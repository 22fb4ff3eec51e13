#include "between.h"

#include "device_primitives.cuh"
#include "element.cuh"

namespace nmexport::cuda {
namespace {

constexpr int kWARP_SIZE = 32;
constexpr int kTHREADS = 512;  // 8 elements each: a token of 4096 channels in one go
constexpr int kWARPS = kTHREADS / kWARP_SIZE;
constexpr int kELEMENTS = 8;  // a thread takes at a time: 16 bytes of a 16-bit type

//! Eight neighbouring elements as float32. The L2 is asked, never a stale line of the L1: the
//! kernel before may have written them while this one was already resident.
template <typename T>
struct Eight {
    float value[kELEMENTS];

    __device__ static Eight load(T const* from) {
        Eight eight;
        constexpr int kVECTORS = kELEMENTS / kVECTOR<T>;
#pragma unroll
        for (int v = 0; v < kVECTORS; ++v) {
            uint4 raw;
            asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
                         : "=r"(raw.x), "=r"(raw.y), "=r"(raw.z), "=r"(raw.w)
                         : "l"(from + v * kVECTOR<T>));
            Unpacked<T> const part = unpack(raw, from);
#pragma unroll
            for (int i = 0; i < kVECTOR<T>; ++i) {
                eight.value[v * kVECTOR<T> + i] = part.value[i];
            }
        }
        return eight;
    }

    __device__ void store(T* to) const {
        alignas(16) T elements[kELEMENTS];
#pragma unroll
        for (int i = 0; i < kELEMENTS; ++i) {
            elements[i] = fromFloat<T>(value[i]);
        }
#pragma unroll
        for (int v = 0; v < kELEMENTS / kVECTOR<T>; ++v) {
            reinterpret_cast<uint4*>(to)[v] = reinterpret_cast<uint4 const*>(elements)[v];
        }
    }
};

//! Sum over the block in a fixed order; every thread gets it.
__device__ float sumOverBlock(float value, float* perWarp) {
#pragma unroll
    for (int offset = kWARP_SIZE / 2; offset > 0; offset /= 2) {
        value += __shfl_xor_sync(0xffffffffU, value, offset);
    }
    if (threadIdx.x % kWARP_SIZE == 0) {
        perWarp[threadIdx.x / kWARP_SIZE] = value;
    }
    __syncthreads();
    float sum = 0.0F;
#pragma unroll
    for (int warp = 0; warp < kWARPS; ++warp) {
        sum += perWarp[warp];
    }
    return sum;
}

//! A block per token. The rounded sum is kept in registers for up to 4 * 4096 channels, the widest
//! models there are; what lies beyond is read again.
template <typename T>
__global__ void __launch_bounds__(kTHREADS) normKernel(NormArgs args) {
    constexpr int kHELD = 4;
    __shared__ float perWarp[kWARPS];
    allowDependentLaunch();
    waitForPredecessors();
    int64_t const start = static_cast<int64_t>(blockIdx.x) * args.channels;
    T const* const x = static_cast<T const*>(args.x) + start;
    T const* const skip = args.skip == nullptr ? nullptr : static_cast<T const*>(args.skip) + start;
    T* const total = args.sum == nullptr ? nullptr : static_cast<T*>(args.sum) + start;
    auto const summed = [&](int32_t channel) {
        Eight<T> sum = Eight<T>::load(x + channel);
        if (skip != nullptr) {
            Eight<T> const other = Eight<T>::load(skip + channel);
#pragma unroll
            for (int i = 0; i < kELEMENTS; ++i) {
                sum.value[i] = toFloat<T>(fromFloat<T>(sum.value[i] + other.value[i]));
            }
        }
        return sum;
    };
    Eight<T> held[kHELD];
    float squares = 0.0F;
    int step = 0;
    for (int32_t channel = static_cast<int32_t>(threadIdx.x) * kELEMENTS; channel < args.channels;
         channel += kTHREADS * kELEMENTS, ++step) {
        Eight<T> const sum = summed(channel);
#pragma unroll
        for (int i = 0; i < kELEMENTS; ++i) {
            squares += sum.value[i] * sum.value[i];
        }
        if (total != nullptr) {
            sum.store(total + channel);
        }
#pragma unroll
        for (int h = 0; h < kHELD; ++h) {
            if (step == h) {
                held[h] = sum;
            }
        }
    }
    float const mean = sumOverBlock(squares, perWarp) / static_cast<float>(args.channels);
    float const factor = rsqrtf(mean + args.epsilon);
    T const* const weight = static_cast<T const*>(args.weight);
    T* const y = static_cast<T*>(args.y) + start;
    step = 0;
    for (int32_t channel = static_cast<int32_t>(threadIdx.x) * kELEMENTS; channel < args.channels;
         channel += kTHREADS * kELEMENTS, ++step) {
        Eight<T> sum;
        if (step >= kHELD) {
            sum = summed(channel);
        }
#pragma unroll
        for (int h = 0; h < kHELD; ++h) {
            if (step == h) {
                sum = held[h];
            }
        }
        Eight<T> const scale = Eight<T>::load(weight + channel);
#pragma unroll
        for (int i = 0; i < kELEMENTS; ++i) {
            sum.value[i] = toFloat<T>(fromFloat<T>(sum.value[i] * factor)) * scale.value[i];
        }
        sum.store(y + channel);
    }
}

template <typename T>
__global__ void __launch_bounds__(kTHREADS) gatedSiluKernel(GatedSiluArgs args, int64_t pieces) {
    allowDependentLaunch();
    waitForPredecessors();
    int64_t const piece = static_cast<int64_t>(blockIdx.x) * kTHREADS + threadIdx.x;
    if (piece >= pieces) {
        return;
    }
    int64_t const perToken = args.channels / kELEMENTS;
    int64_t const token = piece / perToken;
    int64_t const channel = piece % perToken * kELEMENTS;
    int64_t const start = token * args.stride + channel;
    Eight<T> gate = Eight<T>::load(static_cast<T const*>(args.gate) + start);
    Eight<T> const up = Eight<T>::load(static_cast<T const*>(args.up) + start);
#pragma unroll
    for (int i = 0; i < kELEMENTS; ++i) {
        gate.value[i] = gate.value[i] / (1.0F + __expf(-gate.value[i])) * up.value[i];
    }
    gate.store(static_cast<T*>(args.y) + token * args.channels + channel);
}

//! Launches a kernel that may start before the one ahead of it has ended.
template <typename... Parameters, typename... Given>
cudaError_t launchInChain(void (*kernel)(Parameters...), unsigned blocks,
                          DeviceTraits const& device, cudaStream_t stream, Given... given) {
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(kTHREADS);
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = device.computeCapability >= 90 ? 1U : 0U;
    return cudaLaunchKernelEx(&config, kernel, given...);
}

}  // namespace

cudaError_t launchNorm(NormArgs const& args, DeviceTraits const& device, cudaStream_t stream) {
    bool const isWhole = args.x != nullptr && args.y != nullptr && args.weight != nullptr &&
                         args.channels > 0 && args.channels % kELEMENTS == 0 && args.tokens >= 0 &&
                         args.tokens <= 0x7fffffff;
    if (!isWhole) {
        return cudaErrorInvalidValue;
    }
    if (args.tokens == 0) {
        return cudaSuccess;
    }
    unsigned const blocks = static_cast<unsigned>(args.tokens);
    switch (args.type) {
        case DType::kFLOAT32:
            return launchInChain(normKernel<float>, blocks, device, stream, args);
        case DType::kFLOAT16:
            return launchInChain(normKernel<__half>, blocks, device, stream, args);
        case DType::kBFLOAT16:
            return launchInChain(normKernel<__nv_bfloat16>, blocks, device, stream, args);
    }
    return cudaErrorInvalidValue;
}

cudaError_t launchGatedSilu(GatedSiluArgs const& args, DeviceTraits const& device,
                            cudaStream_t stream) {
    int64_t const pieces = args.tokens * (args.channels / kELEMENTS);
    bool const isWhole = args.gate != nullptr && args.up != nullptr && args.y != nullptr &&
                         args.channels > 0 && args.channels % kELEMENTS == 0 &&
                         args.stride % kELEMENTS == 0 && args.tokens >= 0 &&
                         pieces / kTHREADS < 0x7fffffff;
    if (!isWhole) {
        return cudaErrorInvalidValue;
    }
    if (pieces == 0) {
        return cudaSuccess;
    }
    unsigned const blocks = static_cast<unsigned>((pieces + kTHREADS - 1) / kTHREADS);
    switch (args.type) {
        case DType::kFLOAT32:
            return launchInChain(gatedSiluKernel<float>, blocks, device, stream, args, pieces);
        case DType::kFLOAT16:
            return launchInChain(gatedSiluKernel<__half>, blocks, device, stream, args, pieces);
        case DType::kBFLOAT16:
            return launchInChain(gatedSiluKernel<__nv_bfloat16>, blocks, device, stream, args,
                                 pieces);
    }
    return cudaErrorInvalidValue;
}

}  // namespace nmexport::cuda
