// The masked activation for prefill (and NMPrune), and the epilogue that follows its dense product.
#include "mask_pairs.cuh"
#include "warp_selection.cuh"

#include <algorithm>
#include <type_traits>

namespace nmexport::cuda {
namespace {

constexpr int kTHREADS = 256;
constexpr int kWARPS = kTHREADS / kWARP;

//! Sum over the block in a fixed order; every thread gets it.
__device__ float sumOverBlock(float value, float* perWarp) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
        value += __shfl_xor_sync(kWHOLE_WARP, value, offset);
    }
    if (threadIdx.x % kWARP == 0) {
        perWarp[threadIdx.x / kWARP] = value;
    }
    __syncthreads();
    float sum = 0.0F;
    for (int warp = 0; warp < kWARPS; ++warp) {
        sum += perWarp[warp];
    }
    __syncthreads();
    return sum;
}

//! One token's view of the arguments.
template <typename T>
struct TokenRow {
    T const* x;
    T* s;
    uint8_t* keep;
    float eta;
};

template <typename T>
__device__ float shiftOf(Selection const& selection, TokenRow<T> const& row, int32_t position) {
    if (selection.dynamicShift) {
        return row.eta;
    }
    return selection.shiftLength == 0 ? 0.0F
                                      : selection.shift[selection.shiftLength == 1 ? 0 : position];
}

__device__ uint32_t keyOf(Selection const& selection, float z, int32_t position) {
    return selection.scoreScale == nullptr
               ? magnitudeKey(z)
               : orderedKey(scaledScore(z, selection.scoreScale[position]));
}

__device__ float keptValue(Selection const& selection, float z, bool isKept, int32_t position) {
    if (!isKept) {
        return 0.0F;
    }
    return selection.valueScale == nullptr ? z : z * selection.valueScale[position];
}

//! One group in the widest pieces its size allows.
template <typename T, int GROUP>
__device__ __forceinline__ void copyGroup(T* target, T const* source) {
    using Piece = std::conditional_t<GROUP * sizeof(T) % 16 == 0, uint4, uint2>;
    constexpr int kPIECES = static_cast<int>(GROUP * sizeof(T) / sizeof(Piece));
#pragma unroll
    for (int i = 0; i < kPIECES; ++i) {
        reinterpret_cast<Piece*>(target)[i] = reinterpret_cast<Piece const*>(source)[i];
    }
}

//! A thread per group: GROUP consecutive channels ranked by a register network.
template <typename T, int GROUP>
struct NetworkMasker {
    __device__ static void run(MaskArgs const& args, TokenRow<T> const& row, Moments& moments) {
        Selection const& selection = args.selection;
        int32_t const groups = args.channels / GROUP;
        int32_t const stride = static_cast<int32_t>(gridDim.y) * kTHREADS;
        for (int32_t group = static_cast<int32_t>(blockIdx.y) * kTHREADS + threadIdx.x;
             group < groups; group += stride) {
            int32_t const first = group * GROUP;
            alignas(16) T elements[GROUP];
            copyGroup<T, GROUP>(elements, row.x + first);
            float z[GROUP];
            uint32_t keys[GROUP];
#pragma unroll
            for (int i = 0; i < GROUP; ++i) {
                z[i] = toFloat<T>(elements[i]) - shiftOf(selection, row, first + i);
                keys[i] = keyOf(selection, z[i], first + i);
            }
            uint32_t const mask =
                selection.n == GROUP ? 0xffffffffU : keepMask<GROUP>(keys, selection.n);
#pragma unroll
            for (int i = 0; i < GROUP; ++i) {
                bool const isKept = (mask >> i & 1U) != 0U;
                elements[i] = fromFloat<T>(keptValue(selection, z[i], isKept, first + i));
                if (row.keep != nullptr) {
                    row.keep[first + i] = isKept ? 1 : 0;
                }
                if (selection.varianceCorrection) {
                    moments.add(z[i], isKept);
                }
            }
            copyGroup<T, GROUP>(row.s + first, elements);
        }
    }
};

//! 8 of 16 by bare magnitude, 16-bit types: a thread ranks two groups at once. Tokens play no part:
//! the activations are one run of pairs of groups.
template <typename T>
__global__ void __launch_bounds__(kTHREADS)
    pairMaskKernel(uint4 const* x, uint4* s, uint8_t* keep, int64_t pairs) {
    int64_t const pair = static_cast<int64_t>(blockIdx.x) * kTHREADS + threadIdx.x;
    if (pair >= pairs) {
        return;
    }
    uint4 const* const source = x + 4 * pair;
    uint4 const a[2] = {source[0], source[1]};
    uint4 const b[2] = {source[2], source[3]};
    storePair(s + 4 * pair, a, b, keepOfPair<T>(a, b),
              keep == nullptr ? nullptr : keep + 32 * pair);
}

//! A row of whole vectors (see the dispatch), by all threads of the block.
template <typename T>
__device__ __forceinline__ void copyRow(T* target, T const* source, int32_t channels) {
    int32_t const vectors = channels * static_cast<int32_t>(sizeof(T)) / 16;
    for (int32_t i = threadIdx.x; i < vectors; i += static_cast<int32_t>(blockDim.x)) {
        reinterpret_cast<uint4*>(target)[i] = reinterpret_cast<uint4 const*>(source)[i];
    }
}

//! Groups of GROUP of a channel order, each ranked by a thread: the token's row lies in shared
//! memory, where gathering is cheap.
//!
//!   x        -> staged | by channel |  -> group g: channels order[g * GROUP ..]
//!   gathered:   the group is written where it stands, in one run
//!   by channel: its elements go back to their places in `staged`, which leaves in one piece
template <typename T, int GROUP>
struct OrderedMasker {
    __device__ static void run(MaskArgs const& args, TokenRow<T> const& row, Moments& moments) {
        extern __shared__ __align__(16) unsigned char rowBytes[];
        T* const staged = reinterpret_cast<T*>(rowBytes);
        Selection const& selection = args.selection;
        copyRow(staged, row.x, args.channels);
        __syncthreads();
        for (int32_t group = threadIdx.x; group < args.channels / GROUP;
             group += static_cast<int32_t>(blockDim.x)) {
            int32_t const first = group * GROUP;
            int32_t channel[GROUP];
            uint32_t keys[GROUP];
#pragma unroll
            for (int i = 0; i < GROUP; ++i) {
                channel[i] = __ldg(selection.channelOrder + first + i);
                float const z = toFloat<T>(staged[channel[i]]) - shiftOf(selection, row, first + i);
                keys[i] = keyOf(selection, z, first + i);
            }
            uint32_t const mask =
                selection.n == GROUP ? 0xffffffffU : keepMask<GROUP>(keys, selection.n);
            alignas(16) T elements[GROUP];
#pragma unroll
            for (int i = 0; i < GROUP; ++i) {
                bool const isKept = (mask >> i & 1U) != 0U;
                float const z = toFloat<T>(staged[channel[i]]) - shiftOf(selection, row, first + i);
                elements[i] = fromFloat<T>(keptValue(selection, z, isKept, first + i));
                if (row.keep != nullptr) {
                    row.keep[args.isGathered ? first + i : channel[i]] = isKept ? 1 : 0;
                }
                if (selection.varianceCorrection) {
                    moments.add(z, isKept);
                }
            }
            if (args.isGathered) {
                copyGroup<T, GROUP>(row.s + first, elements);
            } else {
#pragma unroll
                for (int i = 0; i < GROUP; ++i) {
                    staged[channel[i]] = elements[i];
                }
            }
        }
        if (!args.isGathered) {
            __syncthreads();
            copyRow(row.s, staged, args.channels);
        }
    }
};

//! A warp per chunk of whole groups: any m, any channel order.
template <typename T>
struct RankMasker {
    __device__ static void run(MaskArgs const& args, TokenRow<T> const& row, Moments& moments) {
        __shared__ uint32_t keysOfWarps[kWARPS][kMAX_GROUP];
        Selection const& selection = args.selection;
        uint32_t* const keys = keysOfWarps[threadIdx.x / kWARP];
        int const lane = threadIdx.x % kWARP;
        int32_t const width = chunkWidth(selection.m);
        int32_t const chunks = ceilDivide(args.channels, width);
        int32_t const stride = static_cast<int32_t>(gridDim.y) * kWARPS;
        for (int32_t chunk = static_cast<int32_t>(blockIdx.y) * kWARPS + threadIdx.x / kWARP;
             chunk < chunks; chunk += stride) {
            int32_t const first = chunk * width;
            int32_t const count = min(width, args.channels - first);
            int32_t place[2];  // in s
            float z[2];
            __syncwarp();  // the chunk before is ranked
#pragma unroll
            for (int part = 0; part < 2; ++part) {
                int32_t const element = part * kWARP + lane;
                if (element < count) {
                    int32_t const position = first + element;
                    int32_t const channel = selection.channelOrder == nullptr
                                                ? position
                                                : selection.channelOrder[position];
                    place[part] = args.isGathered ? position : channel;
                    z[part] = toFloat<T>(row.x[channel]) - shiftOf(selection, row, position);
                    keys[element] = keyOf(selection, z[part], position);
                }
            }
            __syncwarp();
#pragma unroll
            for (int part = 0; part < 2; ++part) {
                int32_t const element = part * kWARP + lane;
                if (element < count) {
                    int32_t const index = element % selection.m;
                    bool const isKept =
                        rankInGroup(keys + element - index, selection.m, index) < selection.n;
                    row.s[place[part]] =
                        fromFloat<T>(keptValue(selection, z[part], isKept, first + element));
                    if (row.keep != nullptr) {
                        row.keep[place[part]] = isKept ? 1 : 0;
                    }
                    if (selection.varianceCorrection) {
                        moments.add(z[part], isKept);
                    }
                }
            }
        }
    }
};

//! grid (tokens, parts): parts is 1 where the token's statistics are needed, since one block must
//! see all of K. Two blocks a multiprocessor at least: left to itself, ptxas takes 64 registers on
//! sm_100 and spills one.
template <typename T, typename Masker>
__global__ void __launch_bounds__(kTHREADS, 2) maskKernel(MaskArgs const args) {
    __shared__ float perWarp[kWARPS];
    __shared__ Moments perWarpMoments[kWARPS];
    int64_t const token = blockIdx.x;
    int64_t const offset = token * args.channels;
    TokenRow<T> row{static_cast<T const*>(args.x) + offset, static_cast<T*>(args.s) + offset,
                    args.keep == nullptr ? nullptr : args.keep + offset, 0.0F};
    if (args.selection.dynamicShift) {
        float sum = 0.0F;
        for (int32_t channel = threadIdx.x; channel < args.channels; channel += kTHREADS) {
            sum += toFloat<T>(row.x[channel]);
        }
        row.eta = sumOverBlock(sum, perWarp) / static_cast<float>(args.channels);
        if (threadIdx.x == 0) {
            args.eta[token] = row.eta;
        }
    }
    Moments moments;
    Masker::run(args, row, moments);
    if (args.selection.varianceCorrection) {
        moments.reduceOverWarp();
        if (threadIdx.x % kWARP == 0) {
            perWarpMoments[threadIdx.x / kWARP] = moments;
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            Moments total;
            for (int warp = 0; warp < kWARPS; ++warp) {
                total.addMoments(perWarpMoments[warp]);
            }
            args.nu[token] = total.correction(args.channels);
        }
    }
}

template <typename T>
__global__ void __launch_bounds__(kTHREADS) epilogueKernel(EpilogueArgs const args) {
    int64_t const token = blockIdx.x;
    float const nu = args.nu == nullptr ? 1.0F : args.nu[token];
    float const eta = args.eta == nullptr ? 0.0F : args.eta[token];
    int32_t const stride = static_cast<int32_t>(gridDim.y) * kTHREADS;
    for (int32_t column = static_cast<int32_t>(blockIdx.y) * kTHREADS + threadIdx.x;
         column < args.outputs; column += stride) {
        float sum = nu * args.product[token * args.outputs + column];
        if (args.eta != nullptr) {
            sum = fmaf(eta, args.shiftWeight[column], sum);
        }
        if (args.bias != nullptr) {
            sum += toFloat<T>(static_cast<T const*>(args.bias)[column]);
        }
        static_cast<T*>(args.y)[token * args.outputs + column] = fromFloat<T>(sum);
    }
}

//! Statistics are summed by one block: see maskKernel.
bool needsWholeRow(MaskArgs const& args) {
    return args.selection.dynamicShift || args.selection.varianceCorrection;
}

template <typename T, typename Masker>
cudaError_t enqueueMask(MaskArgs const& args, int32_t unitsPerBlock, cudaStream_t stream) {
    int32_t const units = ceilDivide(args.channels, unitsPerBlock);
    dim3 const grid(static_cast<unsigned>(args.tokens),
                    needsWholeRow(args) ? 1U : static_cast<unsigned>(units));
    maskKernel<T, Masker><<<grid, kTHREADS, 0, stream>>>(args);
    return cudaGetLastError();
}

template <typename T>
cudaError_t enqueuePairs(MaskArgs const& args, cudaStream_t stream) {
    int64_t const pairs = args.tokens * (args.channels / 32);
    auto const blocks = static_cast<unsigned>((pairs + kTHREADS - 1) / kTHREADS);
    pairMaskKernel<T><<<blocks, kTHREADS, 0, stream>>>(
        static_cast<uint4 const*>(args.x), static_cast<uint4*>(args.s), args.keep, pairs);
    return cudaGetLastError();
}

//! Rows that leave room for two blocks on every supported multiprocessor.
constexpr size_t kMAX_STAGED_BYTES = size_t{44} << 10;

template <typename T, int GROUP>
cudaError_t enqueueOrdered(MaskArgs const& args, cudaStream_t stream) {
    size_t const rowBytes = static_cast<size_t>(args.channels) * sizeof(T);
    maskKernel<T, OrderedMasker<T, GROUP>>
        <<<static_cast<unsigned>(args.tokens), kTHREADS, rowBytes, stream>>>(args);
    return cudaGetLastError();
}

template <typename T>
cudaError_t enqueueMaskOf(MaskArgs const& args, cudaStream_t stream) {
    auto const alignment = reinterpret_cast<uintptr_t>(args.x) |
                           reinterpret_cast<uintptr_t>(args.s) |
                           static_cast<uintptr_t>(args.channels * sizeof(T));
    Selection const& selection = args.selection;
    bool const isAligned = alignment % 16 == 0;
    size_t const rowBytes = static_cast<size_t>(args.channels) * sizeof(T);
    bool const canStage = isAligned && rowBytes <= kMAX_STAGED_BYTES &&
                          reinterpret_cast<uintptr_t>(selection.channelOrder) % 16 == 0;
    if constexpr (sizeof(T) == 2) {
        bool const isBareMagnitude = selection.scoreScale == nullptr &&
                                     selection.valueScale == nullptr &&
                                     selection.shift == nullptr && !needsWholeRow(args);
        if (isBareMagnitude && isAligned && selection.channelOrder == nullptr && selection.n == 8 &&
            selection.m == 16 && args.channels % 32 == 0) {
            return enqueuePairs<T>(args, stream);
        }
    }
    if (selection.channelOrder != nullptr && canStage) {
        switch (selection.m) {
            case 4:
                return enqueueOrdered<T, 4>(args, stream);
            case 8:
                return enqueueOrdered<T, 8>(args, stream);
            case 16:
                return enqueueOrdered<T, 16>(args, stream);
            default:
                break;
        }
    }
    int32_t const m = isAligned && selection.channelOrder == nullptr ? selection.m : 0;
    switch (m) {
        case 4:
            return enqueueMask<T, NetworkMasker<T, 4>>(args, 4 * kTHREADS, stream);
        case 8:
            return enqueueMask<T, NetworkMasker<T, 8>>(args, 8 * kTHREADS, stream);
        case 16:
            return enqueueMask<T, NetworkMasker<T, 16>>(args, 16 * kTHREADS, stream);
        case 32:
            return enqueueMask<T, NetworkMasker<T, 32>>(args, 32 * kTHREADS, stream);
        default:
            return enqueueMask<T, RankMasker<T>>(args, 4 * chunkWidth(selection.m) * kWARPS,
                                                 stream);
    }
}

bool isValid(MaskArgs const& args) {
    Selection const& s = args.selection;
    bool const hasPattern = s.m >= 1 && s.m <= kMAX_GROUP && s.n >= 1 && s.n <= s.m &&
                            args.channels >= s.m && args.channels % s.m == 0;
    bool const hasShift =
        (s.shiftLength == 0 || s.shiftLength == 1 || s.shiftLength == args.channels) &&
        (s.shiftLength == 0) == (s.shift == nullptr) && !(s.dynamicShift && s.shift != nullptr);
    bool const hasOutputs =
        (!s.dynamicShift || args.eta != nullptr) && (!s.varianceCorrection || args.nu != nullptr);
    return hasPattern && hasShift && hasOutputs && args.tokens >= 0 && args.tokens <= 0x7fffffff &&
           args.x != nullptr && args.s != nullptr;
}

}  // namespace

cudaError_t launchMask(MaskArgs const& args, cudaStream_t stream) {
    if (!isValid(args)) {
        return cudaErrorInvalidValue;
    }
    if (args.tokens == 0) {
        return cudaSuccess;
    }
    switch (args.type) {
        case DType::kFLOAT32:
            return enqueueMaskOf<float>(args, stream);
        case DType::kFLOAT16:
            return enqueueMaskOf<__half>(args, stream);
        case DType::kBFLOAT16:
            return enqueueMaskOf<__nv_bfloat16>(args, stream);
    }
    return cudaErrorInvalidValue;
}

cudaError_t launchEpilogue(EpilogueArgs const& args, cudaStream_t stream) {
    bool const isWhole = args.product != nullptr && args.y != nullptr && args.outputs > 0 &&
                         args.tokens >= 0 && args.tokens <= 0x7fffffff &&
                         (args.eta == nullptr || args.shiftWeight != nullptr);
    if (!isWhole) {
        return cudaErrorInvalidValue;
    }
    if (args.tokens == 0) {
        return cudaSuccess;
    }
    unsigned const parts = static_cast<unsigned>(ceilDivide(args.outputs, 4 * kTHREADS));
    dim3 const grid(static_cast<unsigned>(args.tokens), parts);
    switch (args.type) {
        case DType::kFLOAT32:
            epilogueKernel<float><<<grid, kTHREADS, 0, stream>>>(args);
            break;
        case DType::kFLOAT16:
            epilogueKernel<__half><<<grid, kTHREADS, 0, stream>>>(args);
            break;
        case DType::kBFLOAT16:
            epilogueKernel<__nv_bfloat16><<<grid, kTHREADS, 0, stream>>>(args);
            break;
        default:
            return cudaErrorInvalidValue;
    }
    return cudaGetLastError();
}

}  // namespace nmexport::cuda
