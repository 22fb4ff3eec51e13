// The masked activation for prefill (and NMPrune), and the epilogue that follows its dense product.
#include "warp_selection.cuh"

#include <type_traits>

namespace nmexport::cuda
{
namespace
{

constexpr int kTHREADS = 256;
constexpr int kWARPS = kTHREADS / kWARP;

//! Sum over the block in a fixed order; every thread gets it.
__device__ float sumOverBlock(float value, float* perWarp)
{
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2)
    {
        value += __shfl_xor_sync(kWHOLE_WARP, value, offset);
    }
    if (threadIdx.x % kWARP == 0)
    {
        perWarp[threadIdx.x / kWARP] = value;
    }
    __syncthreads();
    float sum = 0.0F;
    for (int warp = 0; warp < kWARPS; ++warp)
    {
        sum += perWarp[warp];
    }
    __syncthreads();
    return sum;
}

//! One token's view of the arguments.
template <typename T>
struct TokenRow
{
    T const* x;
    T* s;
    uint8_t* keep;
    float eta;
};

template <typename T>
__device__ float shiftOf(Selection const& selection, TokenRow<T> const& row, int32_t channel)
{
    if (selection.dynamicShift)
    {
        return row.eta;
    }
    return selection.shiftLength == 0 ? 0.0F : selection.shift[selection.shiftLength == 1 ? 0 : channel];
}

__device__ uint32_t keyOf(Selection const& selection, float z, int32_t channel)
{
    return selection.scoreScale == nullptr ? magnitudeKey(z)
                                           : orderedKey(scaledScore(z, selection.scoreScale[channel]));
}

//! A thread per group: GROUP consecutive channels ranked by a register network.
template <typename T, int GROUP>
struct NetworkMasker
{
    __device__ static void run(MaskArgs const& args, TokenRow<T> const& row, Moments& moments)
    {
        Selection const& selection = args.selection;
        int32_t const groups = args.channels / GROUP;
        int32_t const stride = static_cast<int32_t>(gridDim.y) * kTHREADS;
        for (int32_t group = static_cast<int32_t>(blockIdx.y) * kTHREADS + threadIdx.x; group < groups; group += stride)
        {
            int32_t const first = group * GROUP;
            alignas(16) T elements[GROUP];
            copyGroup(elements, row.x + first);
            float z[GROUP];
            uint32_t keys[GROUP];
#pragma unroll
            for (int i = 0; i < GROUP; ++i)
            {
                z[i] = toFloat<T>(elements[i]) - shiftOf(selection, row, first + i);
                keys[i] = keyOf(selection, z[i], first + i);
            }
            uint32_t const mask = selection.n == GROUP ? 0xffffffffU : keepMask<GROUP>(keys, selection.n);
#pragma unroll
            for (int i = 0; i < GROUP; ++i)
            {
                bool const isKept = (mask >> i & 1U) != 0U;
                elements[i] = fromFloat<T>(isKept ? z[i] : 0.0F);
                if (row.keep != nullptr)
                {
                    row.keep[first + i] = isKept ? 1 : 0;
                }
                if (selection.varianceCorrection)
                {
                    moments.add(z[i], isKept);
                }
            }
            copyGroup(row.s + first, elements);
        }
    }

private:
    //! One group in the widest pieces its size allows.
    __device__ static void copyGroup(T* target, T const* source)
    {
        using Piece = std::conditional_t<GROUP * sizeof(T) % 16 == 0, uint4, uint2>;
        constexpr int kPIECES = static_cast<int>(GROUP * sizeof(T) / sizeof(Piece));
#pragma unroll
        for (int i = 0; i < kPIECES; ++i)
        {
            reinterpret_cast<Piece*>(target)[i] = reinterpret_cast<Piece const*>(source)[i];
        }
    }
};

//! A warp per chunk of whole groups: any m, any channel order.
template <typename T>
struct RankMasker
{
    __device__ static void run(MaskArgs const& args, TokenRow<T> const& row, Moments& moments)
    {
        __shared__ uint32_t keysOfWarps[kWARPS][kMAX_GROUP];
        Selection const& selection = args.selection;
        uint32_t* const keys = keysOfWarps[threadIdx.x / kWARP];
        int const lane = threadIdx.x % kWARP;
        int32_t const width = chunkWidth(selection.m);
        int32_t const chunks = ceilDivide(args.channels, width);
        int32_t const stride = static_cast<int32_t>(gridDim.y) * kWARPS;
        for (int32_t chunk = static_cast<int32_t>(blockIdx.y) * kWARPS + threadIdx.x / kWARP; chunk < chunks;
             chunk += stride)
        {
            int32_t const first = chunk * width;
            int32_t const count = min(width, args.channels - first);
            int32_t channel[2];
            float z[2];
            __syncwarp(); // the chunk before is ranked
#pragma unroll
            for (int part = 0; part < 2; ++part)
            {
                int32_t const element = part * kWARP + lane;
                if (element < count)
                {
                    channel[part] = selection.channelOrder == nullptr ? first + element
                                                                      : selection.channelOrder[first + element];
                    z[part] = toFloat<T>(row.x[channel[part]]) - shiftOf(selection, row, channel[part]);
                    keys[element] = keyOf(selection, z[part], channel[part]);
                }
            }
            __syncwarp();
#pragma unroll
            for (int part = 0; part < 2; ++part)
            {
                int32_t const element = part * kWARP + lane;
                if (element < count)
                {
                    int32_t const index = element % selection.m;
                    bool const isKept = rankInGroup(keys + element - index, selection.m, index) < selection.n;
                    row.s[channel[part]] = fromFloat<T>(isKept ? z[part] : 0.0F);
                    if (row.keep != nullptr)
                    {
                        row.keep[channel[part]] = isKept ? 1 : 0;
                    }
                    if (selection.varianceCorrection)
                    {
                        moments.add(z[part], isKept);
                    }
                }
            }
        }
    }
};

//! grid (tokens, parts): parts is 1 where the token's statistics are needed, since one block must see all of K.
template <typename T, typename Masker>
__global__ void __launch_bounds__(kTHREADS) maskKernel(MaskArgs const args)
{
    __shared__ float perWarp[kWARPS];
    __shared__ Moments perWarpMoments[kWARPS];
    int64_t const token = blockIdx.x;
    int64_t const offset = token * args.channels;
    TokenRow<T> row{static_cast<T const*>(args.x) + offset, static_cast<T*>(args.s) + offset,
        args.keep == nullptr ? nullptr : args.keep + offset, 0.0F};
    if (args.selection.dynamicShift)
    {
        float sum = 0.0F;
        for (int32_t channel = threadIdx.x; channel < args.channels; channel += kTHREADS)
        {
            sum += toFloat<T>(row.x[channel]);
        }
        row.eta = sumOverBlock(sum, perWarp) / static_cast<float>(args.channels);
        if (threadIdx.x == 0)
        {
            args.eta[token] = row.eta;
        }
    }
    Moments moments;
    Masker::run(args, row, moments);
    if (args.selection.varianceCorrection)
    {
        moments.reduceOverWarp();
        if (threadIdx.x % kWARP == 0)
        {
            perWarpMoments[threadIdx.x / kWARP] = moments;
        }
        __syncthreads();
        if (threadIdx.x == 0)
        {
            Moments total;
            for (int warp = 0; warp < kWARPS; ++warp)
            {
                total.addMoments(perWarpMoments[warp]);
            }
            args.nu[token] = total.correction(args.channels);
        }
    }
}

template <typename T>
__global__ void __launch_bounds__(kTHREADS) epilogueKernel(EpilogueArgs const args)
{
    int64_t const token = blockIdx.x;
    float const nu = args.nu == nullptr ? 1.0F : args.nu[token];
    float const eta = args.eta == nullptr ? 0.0F : args.eta[token];
    int32_t const stride = static_cast<int32_t>(gridDim.y) * kTHREADS;
    for (int32_t column = static_cast<int32_t>(blockIdx.y) * kTHREADS + threadIdx.x; column < args.outputs;
         column += stride)
    {
        float sum = nu * args.product[token * args.outputs + column];
        if (args.eta != nullptr)
        {
            sum = fmaf(eta, args.shiftWeight[column], sum);
        }
        if (args.bias != nullptr)
        {
            sum += toFloat<T>(static_cast<T const*>(args.bias)[column]);
        }
        static_cast<T*>(args.y)[token * args.outputs + column] = fromFloat<T>(sum);
    }
}

template <typename T, typename Masker>
cudaError_t enqueueMask(MaskArgs const& args, int32_t unitsPerBlock, cudaStream_t stream)
{
    bool const needsStatistics = args.selection.dynamicShift || args.selection.varianceCorrection;
    int32_t const units = ceilDivide(args.channels, unitsPerBlock);
    dim3 const grid(static_cast<unsigned>(args.tokens), needsStatistics ? 1U : static_cast<unsigned>(units));
    maskKernel<T, Masker><<<grid, kTHREADS, 0, stream>>>(args);
    return cudaGetLastError();
}

template <typename T>
cudaError_t enqueueMaskOf(MaskArgs const& args, cudaStream_t stream)
{
    auto const alignment = reinterpret_cast<uintptr_t>(args.x) | reinterpret_cast<uintptr_t>(args.s)
        | static_cast<uintptr_t>(args.channels * sizeof(T));
    bool const canUseNetwork = args.selection.channelOrder == nullptr && alignment % 16 == 0;
    int32_t const m = canUseNetwork ? args.selection.m : 0;
    switch (m)
    {
    case 4: return enqueueMask<T, NetworkMasker<T, 4>>(args, 4 * kTHREADS, stream);
    case 8: return enqueueMask<T, NetworkMasker<T, 8>>(args, 8 * kTHREADS, stream);
    case 16: return enqueueMask<T, NetworkMasker<T, 16>>(args, 16 * kTHREADS, stream);
    case 32: return enqueueMask<T, NetworkMasker<T, 32>>(args, 32 * kTHREADS, stream);
    default: return enqueueMask<T, RankMasker<T>>(args, 4 * chunkWidth(args.selection.m) * kWARPS, stream);
    }
}

bool isValid(MaskArgs const& args)
{
    Selection const& s = args.selection;
    bool const hasPattern = s.m >= 1 && s.m <= kMAX_GROUP && s.n >= 1 && s.n <= s.m && args.channels >= s.m
        && args.channels % s.m == 0;
    bool const hasShift = (s.shiftLength == 0 || s.shiftLength == 1 || s.shiftLength == args.channels)
        && (s.shiftLength == 0) == (s.shift == nullptr) && !(s.dynamicShift && s.shift != nullptr);
    bool const hasOutputs = (!s.dynamicShift || args.eta != nullptr) && (!s.varianceCorrection || args.nu != nullptr);
    return hasPattern && hasShift && hasOutputs && args.tokens >= 0 && args.tokens <= 0x7fffffff && args.x != nullptr
        && args.s != nullptr;
}

} // namespace

cudaError_t launchMask(MaskArgs const& args, cudaStream_t stream)
{
    if (!isValid(args))
    {
        return cudaErrorInvalidValue;
    }
    if (args.tokens == 0)
    {
        return cudaSuccess;
    }
    switch (args.type)
    {
    case DType::kFLOAT32: return enqueueMaskOf<float>(args, stream);
    case DType::kFLOAT16: return enqueueMaskOf<__half>(args, stream);
    case DType::kBFLOAT16: return enqueueMaskOf<__nv_bfloat16>(args, stream);
    }
    return cudaErrorInvalidValue;
}

cudaError_t launchEpilogue(EpilogueArgs const& args, cudaStream_t stream)
{
    bool const isWhole = args.product != nullptr && args.y != nullptr && args.outputs > 0 && args.tokens >= 0
        && args.tokens <= 0x7fffffff && (args.eta == nullptr || args.shiftWeight != nullptr);
    if (!isWhole)
    {
        return cudaErrorInvalidValue;
    }
    if (args.tokens == 0)
    {
        return cudaSuccess;
    }
    unsigned const parts = static_cast<unsigned>(ceilDivide(args.outputs, 4 * kTHREADS));
    dim3 const grid(static_cast<unsigned>(args.tokens), parts);
    switch (args.type)
    {
    case DType::kFLOAT32: epilogueKernel<float><<<grid, kTHREADS, 0, stream>>>(args); break;
    case DType::kFLOAT16: epilogueKernel<__half><<<grid, kTHREADS, 0, stream>>>(args); break;
    case DType::kBFLOAT16: epilogueKernel<__nv_bfloat16><<<grid, kTHREADS, 0, stream>>>(args); break;
    default: return cudaErrorInvalidValue;
    }
    return cudaGetLastError();
}

} // namespace nmexport::cuda
