// Every warp is on its own until the end: it loads tiles of 16 positions straight from global
// memory into the registers of tensor-core instructions, so nothing passes through shared memory
// and no barrier stands in the loop.
//
//   S [heads, 16 positions] = Q [heads, D] · K^T     rows of K: one per 4 lanes, 16 bytes each
//   O^T [D, heads]         += V^T · P^T              four positions per lane, paired by a permute
//
// The order of D inside an instruction is free as long as both operands share it, so a lane loads
// whole 16-byte chunks. Below, lane = 4 * g + t, and chunk c is elements 8 * c .. 8 * c + 7.
#include "attention.h"

#include "device_primitives.cuh"
#include "element.cuh"

namespace nmexport::cuda {
namespace {

constexpr int kWARP_SIZE = 32;
constexpr int kWARPS = 8;
constexpr int kTHREADS = kWARPS * kWARP_SIZE;
constexpr int kRANKS = 8;                       // CTAs of a cluster: the most that always fit
constexpr int kTILE = 16;                       // positions
constexpr int kSLOTS = kRANKS * kWARPS;         // warps of a cluster
constexpr int kSTEP = kSLOTS * kTILE;           // positions from one of a warp's tiles to its next
constexpr int kCHUNK = 8;                       // elements in 16 bytes
constexpr int kMOST_GROUP = 8;                  // heads of queries to one of keys
constexpr int kPAD = 8;                         // floats between heads: fewer bank conflicts
constexpr float kLOG2_E = 1.4426950408889634F;  // scores are in units of log2
constexpr uint32_t kALL_LANES = 0xffffffffU;

__device__ __forceinline__ float lowest() {
    return __int_as_float(static_cast<int>(0xff800000U));
}

__device__ __forceinline__ float exp2Approx(float value) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
    return result;
}

//! 16 bytes of the cache or a table, or zeros. Not through the non-coherent path: the assembler
//! would move such loads behind the wait for the kernel before.
__device__ __forceinline__ uint4 loadConstantWhere(bool isThere, void const* address) {
    uint4 value;
    asm volatile(
        "{\n"
        ".reg .pred there;\n"
        "setp.ne.s32 there, %5, 0;\n"
        "mov.b32 %0, 0;\n"
        "mov.b32 %1, 0;\n"
        "mov.b32 %2, 0;\n"
        "mov.b32 %3, 0;\n"
        "@there ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\n"
        "}"
        : "=&r"(value.x), "=&r"(value.y), "=&r"(value.z), "=&r"(value.w)
        : "l"(address), "r"(static_cast<int>(isThere)));
    return value;
}

//! 16 bytes that the kernel before wrote, or zeros: from the L2, never a stale line of the L1.
__device__ __forceinline__ uint4 loadActivationsWhere(bool isThere, void const* address) {
    uint4 value;
    asm volatile(
        "{\n"
        ".reg .pred there;\n"
        "setp.ne.s32 there, %5, 0;\n"
        "mov.b32 %0, 0;\n"
        "mov.b32 %1, 0;\n"
        "mov.b32 %2, 0;\n"
        "mov.b32 %3, 0;\n"
        "@there ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];\n"
        "}"
        : "=&r"(value.x), "=&r"(value.y), "=&r"(value.z), "=&r"(value.w)
        : "l"(address), "r"(static_cast<int>(isThere)));
    return value;
}

__device__ __forceinline__ uint32_t sharedAddress(void const* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

//! To and from shared memory, by instructions that the compiler neither drops nor moves out of a
//! loop.
__device__ __forceinline__ void storeShared(uint32_t address, uint4 value) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(value.x),
                 "r"(value.y), "r"(value.z), "r"(value.w)
                 : "memory");
}

__device__ __forceinline__ uint4 loadShared(uint32_t address) {
    uint4 value;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "r"(address));
    return value;
}

//! One of four words; the index is known when this is compiled.
__device__ __forceinline__ uint32_t word(uint4 const& from, int index) {
    return index == 0 ? from.x : index == 1 ? from.y : index == 2 ? from.z : from.w;
}

__device__ __forceinline__ uint32_t packed(float low, float high, __half const*) {
    __half2 const both = __floats2half2_rn(low, high);
    uint32_t bits;
    memcpy(&bits, &both, sizeof(bits));
    return bits;
}

__device__ __forceinline__ uint32_t packed(float low, float high, __nv_bfloat16 const*) {
    __nv_bfloat162 const both = __floats2bfloat162_rn(low, high);
    uint32_t bits;
    memcpy(&bits, &both, sizeof(bits));
    return bits;
}

//! sums [16, 8] += a [16, 16] · b [16, 8].
template <typename T>
__device__ __forceinline__ void multiplyAdd(float (&sums)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                            uint32_t a3, uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
    if constexpr (sizeof(T) != 2) {
        return;
    } else if constexpr (kNAN_KEY<T> == kNAN_KEY<__half>) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    } else {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    }
#endif
}

//! Cosines and sines of one position for a lane's chunks t, t + 4, ... of a head. WHOLE: all of a
//! head is turned, so both of a pair of elements are the same lane's.
template <typename T, int HEAD, bool WHOLE>
struct Turn {
    static constexpr int kCHUNKS = HEAD / 32;
    static constexpr int kTABLE = WHOLE ? kCHUNKS / 2 : kCHUNKS;

    int32_t half;  //!< chunks of a half of the rotary part
    uint4 cosine[kTABLE];
    uint4 sine[kTABLE];

    __device__ void load(AttentionArgs const& args, int32_t position, int t) {
        half = args.rotary / (2 * kCHUNK);
        int64_t const row = static_cast<int64_t>(min(position, args.positions - 1)) * half;
#pragma unroll
        for (int i = 0; i < kTABLE; ++i) {
            int const chunk = t + 4 * i;
            bool const isTurned = WHOLE || chunk < 2 * half;
            int64_t const at = (row + (WHOLE || chunk < half ? chunk : chunk - half)) * kCHUNK;
            cosine[i] = loadConstantWhere(isTurned, static_cast<T const*>(args.cosines) + at);
            sine[i] = loadConstantWhere(isTurned, static_cast<T const*>(args.sines) + at);
        }
    }

    //! The lane's chunks of a head, turned and rounded to T.
    __device__ void apply(uint4 (&turned)[kCHUNKS], bool isThere, T const* head, int t) const {
#pragma unroll
        for (int i = 0; i < kCHUNKS; ++i) {
            turned[i] = loadActivationsWhere(isThere, head + (t + 4 * i) * kCHUNK);
        }
        if constexpr (WHOLE) {
#pragma unroll
            for (int i = 0; i < kTABLE; ++i) {
                uint4 const first = turned[i];
                uint4 const second = turned[i + kTABLE];
                turned[i] = turn(first, second, cosine[i], sine[i], true);
                turned[i + kTABLE] = turn(second, first, cosine[i], sine[i], false);
            }
        } else {
            turnPart(turned, isThere, head, t);
        }
    }

  private:
    __device__ void turnPart(uint4 (&turned)[kCHUNKS], bool isThere, T const* head, int t) const {
        uint4 partner[kCHUNKS];
#pragma unroll
        for (int i = 0; i < kCHUNKS; ++i) {
            int const chunk = t + 4 * i;
            int const other = chunk < half ? chunk + half : chunk - half;
            partner[i] = loadActivationsWhere(isThere && chunk < 2 * half, head + other * kCHUNK);
        }
#pragma unroll
        for (int i = 0; i < kTABLE; ++i) {
            int const chunk = t + 4 * i;
            if (chunk < 2 * half) {
                turned[i] = turn(turned[i], partner[i], cosine[i], sine[i], chunk < half);
            }
        }
    }

    //! x · cos - partner · sin in the first half, x · cos + partner · sin in the second.
    static __device__ uint4 turn(uint4 own, uint4 partner, uint4 cosine, uint4 sine, bool isFirst) {
        T const* const type = nullptr;
        Unpacked<T> const x = unpack(own, type);
        Unpacked<T> const other = unpack(partner, type);
        Unpacked<T> const c = unpack(cosine, type);
        Unpacked<T> const s = unpack(sine, type);
        float result[kCHUNK];
#pragma unroll
        for (int i = 0; i < kCHUNK; ++i) {
            float const across = isFirst ? -other.value[i] : other.value[i];
            result[i] = x.value[i] * c.value[i] + across * s.value[i];
        }
        return {packed(result[0], result[1], type), packed(result[2], result[3], type),
                packed(result[4], result[5], type), packed(result[6], result[7], type)};
    }
};

//! The old rows of one head of keys that the new token sees.
template <typename T, int HEAD>
struct OldRows {
    T* keys;        //!< position g, chunk t
    T* values;      //!< position 2t, chunk g
    int32_t end;    //!< the new token's position
    int32_t older;  //!< positions before it that it sees, if there are as many

    __device__ bool has(int32_t position) const {
        return static_cast<uint32_t>(end - 1 - position) < static_cast<uint32_t>(older);
    }
};

//! 16 positions as a lane holds them.
template <typename T, int HEAD>
struct Tile {
    uint4 keys[2][HEAD / 32];    //!< positions g and 8 + g, chunks t, t + 4, ...
    uint4 values[HEAD / 64][4];  //!< chunks g, g + 8; positions 2t, 2t + 1, 8 + 2t, 9 + 2t

    __device__ void loadKeys(OldRows<T, HEAD> const& rows, int32_t position, int g) {
        T const* const from = rows.keys + static_cast<int64_t>(position) * HEAD;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            bool const isThere = rows.has(position + 8 * half + g);
#pragma unroll
            for (int i = 0; i < HEAD / 32; ++i) {
                keys[half][i] = loadConstantWhere(isThere, from + 8 * half * HEAD + 4 * i * kCHUNK);
            }
        }
    }

    __device__ void loadValues(OldRows<T, HEAD> const& rows, int32_t position, int t) {
        T const* const from = rows.values + static_cast<int64_t>(position) * HEAD;
#pragma unroll
        for (int p = 0; p < 4; ++p) {
            int const ahead = 8 * (p / 2) + p % 2;
            bool const isThere = rows.has(position + ahead + 2 * t);
#pragma unroll
            for (int m = 0; m < HEAD / 64; ++m) {
                values[m][p] = loadConstantWhere(isThere, from + ahead * HEAD + 8 * m * kCHUNK);
            }
        }
    }
};

//! Asks for a tile's values of 128 elements, 128 bytes a lane.
template <typename T, int HEAD>
__device__ __forceinline__ void prefetchValues(OldRows<T, HEAD> const& rows, int32_t position,
                                               int lane) {
    static_assert(HEAD * sizeof(T) <= 256);
    int32_t const row = position + lane / 2;
    if (rows.has(row)) {
        int const offset = 2 * (lane % 4) * HEAD + lane / 4 * kCHUNK;  // of rows.values
        prefetchToL2(rows.values - offset + static_cast<int64_t>(row) * HEAD +
                     lane % 2 * (HEAD / 2));
    }
}

//! Softmax so far: of the positions that a warp has seen.
template <typename T, int HEAD>
struct Softmax {
    float highest;  //!< score of head g
    float total;    //!< sum of head g's weights over this lane's positions
    //! Sums of weighted values: [m][j] is elements 2j (first two) and 2j + 1 of chunk g + 8m, for
    //! heads 2t and 2t + 1.
    float sums[HEAD / 64][4][4];

    __device__ void clear() {
        highest = lowest();
        total = 0.0F;
#pragma unroll
        for (int m = 0; m < HEAD / 64; ++m) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    sums[m][j][i] = 0.0F;
                }
            }
        }
    }

    //! The new token alone: a weight of one for its values [chunks g, g + 8].
    __device__ void begin(float score, uint4 const (&values)[HEAD / 64], int t) {
        highest = score;
        total = t == 0 ? 1.0F : 0.0F;
#pragma unroll
        for (int m = 0; m < HEAD / 64; ++m) {
            Unpacked<T> const value = unpack(values[m], static_cast<T const*>(nullptr));
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                sums[m][j][0] = sums[m][j][1] = value.value[2 * j];
                sums[m][j][2] = sums[m][j][3] = value.value[2 * j + 1];
            }
        }
    }

    //! Makes weights of a tile's scores: positions 2t, 2t + 1, 8 + 2t, 9 + 2t of head g, in units
    //! of log2.
    __device__ void weigh(float (&scores)[4], int t) {
        float top = fmaxf(fmaxf(scores[0], scores[1]), fmaxf(scores[2], scores[3]));
        top = fmaxf(top, __shfl_xor_sync(kALL_LANES, top, 1));
        top = fmaxf(top, __shfl_xor_sync(kALL_LANES, top, 2));
        float const raised = fmaxf(highest, top);
        float const base = raised == lowest() ? 0.0F : raised;
        if (__any_sync(kALL_LANES, raised != highest)) {
            float const factor = exp2Approx(highest - base);
            float const even = __shfl_sync(kALL_LANES, factor, 8 * t);
            float const odd = __shfl_sync(kALL_LANES, factor, 8 * t + 4);
            total *= factor;
#pragma unroll
            for (int m = 0; m < HEAD / 64; ++m) {
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    sums[m][j][0] *= even;
                    sums[m][j][1] *= odd;
                    sums[m][j][2] *= even;
                    sums[m][j][3] *= odd;
                }
            }
            highest = raised;
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            scores[i] = exp2Approx(scores[i] - base);
            total += scores[i];
        }
    }

    //! Adds a tile's values, weighted.
    __device__ void add(Tile<T, HEAD> const& tile, float const (&weights)[4]) {
        T const* const type = nullptr;
        uint32_t const b0 = packed(weights[0], weights[1], type);
        uint32_t const b1 = packed(weights[2], weights[3], type);
#pragma unroll
        for (int m = 0; m < HEAD / 64; ++m) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                uint32_t rows[4];
#pragma unroll
                for (int p = 0; p < 4; ++p) {
                    rows[p] = word(tile.values[m][p], j);
                }
                multiplyAdd<T>(sums[m][j], __byte_perm(rows[0], rows[1], 0x5410),
                               __byte_perm(rows[0], rows[1], 0x7632),
                               __byte_perm(rows[2], rows[3], 0x5410),
                               __byte_perm(rows[2], rows[3], 0x7632), b0, b1);
            }
        }
    }
};

//! A lane's own chunks t, t + 4, ... of query head g, in shared memory: registers are for tiles.
template <int HEAD>
struct LaneQuery {
    uint32_t own;     //!< address of chunk t
    uint32_t stride;  //!< bytes to the lane's next chunk
    bool isThere;     //!< zeros where there is no head g

    __device__ void store(uint4 const (&query)[HEAD / 32]) const {
        if (isThere) {
#pragma unroll
            for (int i = 0; i < HEAD / 32; ++i) {
                storeShared(own + i * stride, query[i]);
            }
        }
    }

    __device__ uint4 chunk(int i) const {
        return isThere ? loadShared(own + i * stride) : uint4{0, 0, 0, 0};
    }
};

//! Scores of head g for a tile's positions 2t, 2t + 1, 8 + 2t, 9 + 2t.
template <typename T, int HEAD>
__device__ __forceinline__ void scoreTile(float (&scores)[4], LaneQuery<HEAD> const& query,
                                          Tile<T, HEAD> const& tile) {
    float products[2][4] = {};  // heads 8 .. 15, the last two of each, are none
#pragma unroll
    for (int i = 0; i < HEAD / 32; ++i) {
        uint4 const chunk = query.chunk(i);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            uint4 const key = tile.keys[half][i];
            multiplyAdd<T>(products[half], chunk.x, 0, chunk.y, 0, key.x, key.y);
            multiplyAdd<T>(products[half], chunk.z, 0, chunk.w, 0, key.z, key.w);
        }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        scores[i] = products[i / 2][i % 2];
    }
}

//! The new token's score of head g.
template <typename T, int HEAD>
__device__ __forceinline__ float scoreNewKey(LaneQuery<HEAD> const& query,
                                             uint4 const (&key)[HEAD / 32]) {
    T const* const type = nullptr;
    float sum = 0.0F;
#pragma unroll
    for (int i = 0; i < HEAD / 32; ++i) {
        Unpacked<T> const q = unpack(query.chunk(i), type);
        Unpacked<T> const k = unpack(key[i], type);
#pragma unroll
        for (int e = 0; e < kCHUNK; ++e) {
            sum += q.value[e] * k.value[e];
        }
    }
    sum += __shfl_xor_sync(kALL_LANES, sum, 1);
    return sum + __shfl_xor_sync(kALL_LANES, sum, 2);
}

//! Shared memory of a CTA, the same in all of a cluster. Only rank 0 is sent to.
template <int HEAD>
struct Exchange {
    __device__ Exchange(unsigned char* bytes, int group)
        : group{group},
          mailbox{reinterpret_cast<uint64_t*>(bytes)},
          sums{reinterpret_cast<float2*>(bytes + 16)},
          states{sums + kRANKS * group * (HEAD / 2)},
          warpSums{reinterpret_cast<float*>(states + kRANKS * group)},
          warpStates{reinterpret_cast<float2*>(warpSums + kWARPS * group * (HEAD + kPAD))} {}

    static size_t bytes(int group) {
        size_t const heads = static_cast<size_t>(group);
        return 16 + kRANKS * heads * (HEAD / 2 + 1) * sizeof(float2) +
               kWARPS * heads * ((HEAD + kPAD) * sizeof(float) + sizeof(float2));
    }

    __device__ float* sumsOf(int warp) const { return warpSums + warp * group * (HEAD + kPAD); }

    __device__ uint32_t mailBytes() const {
        return static_cast<uint32_t>(kRANKS * group * (HEAD / 2 + 1) * sizeof(float2));
    }

    int group;  //!< heads
    uint64_t* mailbox;
    float2* sums;        //!< [ranks, heads, HEAD / 2]
    float2* states;      //!< [ranks, heads] highest and total
    float* warpSums;     //!< [warps, heads, HEAD + kPAD]; before, each warp's queries lie there
    float2* warpStates;  //!< [warps, heads]
};

template <typename T, int HEAD>
__device__ __forceinline__ void storeWarp(Exchange<HEAD> const& exchange,
                                          Softmax<T, HEAD> const& softmax, int warp, int g, int t) {
    float total = softmax.total;
    total += __shfl_xor_sync(kALL_LANES, total, 1);
    total += __shfl_xor_sync(kALL_LANES, total, 2);
    if (t == 0 && g < exchange.group) {
        exchange.warpStates[warp * exchange.group + g] = {softmax.highest, total};
    }
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) {
        int const head = 2 * t + odd;
        if (head >= exchange.group) {
            continue;
        }
        float* const to = exchange.sumsOf(warp) + head * (HEAD + kPAD);
#pragma unroll
        for (int m = 0; m < HEAD / 64; ++m) {
#pragma unroll
            for (int j = 0; j < 4; j += 2) {
                auto const& s = softmax.sums[m];
                *reinterpret_cast<float4*>(to + (g + 8 * m) * kCHUNK + 2 * j) = {
                    s[j][odd], s[j][2 + odd], s[j + 1][odd], s[j + 1][2 + odd]};
            }
        }
    }
}

//! Adds up partial sums that were made against different highest scores.
template <int COUNT>
struct Merged {
    float highest{lowest()};
    float total{0.0F};
    float2 sum{0.0F, 0.0F};

    //! `sumOf(i)` and states[i * stride] of part i.
    template <typename SumOf>
    __device__ Merged(float2 const* states, int stride, SumOf const& sumOf) {
        float2 state[COUNT];
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            state[i] = states[i * stride];
            highest = fmaxf(highest, state[i].x);
        }
        float const base = highest == lowest() ? 0.0F : highest;
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            float const factor = exp2Approx(state[i].x - base);
            float2 const part = sumOf(i);
            total += state[i].y * factor;
            sum.x += part.x * factor;
            sum.y += part.y * factor;
        }
    }
};

__device__ __forceinline__ uint64_t bitsOf(float2 value) {
    return static_cast<uint64_t>(__float_as_uint(value.y)) << 32 | __float_as_uint(value.x);
}

//! CTAs with one tile in flight that share a multiprocessor's registers. Two of them fit where the
//! assembler needs no more than 128 a thread: for compute capability 9.0.
#if __CUDA_ARCH__ == 900
constexpr int kSHARERS = 2;
#else
constexpr int kSHARERS = 1;
#endif

//! Sends what this CTA's warps found to rank 0.
template <int HEAD>
__device__ __forceinline__ void sendSums(Exchange<HEAD> const& exchange, uint32_t rank) {
    int const items = exchange.group * (HEAD / 2);
    for (int item = threadIdx.x; item < items; item += kTHREADS) {
        int const head = item / (HEAD / 2);
        int const pair = item % (HEAD / 2);
        Merged<kWARPS> const merged(exchange.warpStates + head, exchange.group, [&](int warp) {
            return *reinterpret_cast<float2 const*>(exchange.sumsOf(warp) + head * (HEAD + kPAD) +
                                                    2 * pair);
        });
        sendToRankZero(reinterpret_cast<uint64_t*>(exchange.sums + rank * items + item),
                       bitsOf(merged.sum), exchange.mailbox);
        if (pair == 0) {
            sendToRankZero(
                reinterpret_cast<uint64_t*>(exchange.states + rank * exchange.group + head),
                bitsOf({merged.highest, merged.total}), exchange.mailbox);
        }
    }
}

//! Rank 0, once all has come.
template <typename T, int HEAD>
__device__ __forceinline__ void storeResult(Exchange<HEAD> const& exchange, T* y) {
    int const items = exchange.group * (HEAD / 2);
    for (int item = threadIdx.x; item < items; item += kTHREADS) {
        Merged<kRANKS> const merged(exchange.states + item / (HEAD / 2), exchange.group,
                                    [&](int rank) { return exchange.sums[rank * items + item]; });
        float const share = 1.0F / merged.total;
        reinterpret_cast<uint32_t*>(y)[item] =
            packed(merged.sum.x * share, merged.sum.y * share, static_cast<T const*>(nullptr));
    }
}

//! grid (ranks, heads of keys, batch). DEPTH tiles of a warp are in flight: it sets how many CTAs a
//! multiprocessor holds, and no result.
template <typename T, int HEAD, bool WHOLE, int DEPTH>
__global__ void __launch_bounds__(kTHREADS, DEPTH == 1 ? kSHARERS : 1)
    attentionKernel(AttentionArgs const args, int const group, int32_t const older,
                    float const scoreScale, bool const allowsNextLate) {
#if __CUDA_ARCH__ >= 900
    extern __shared__ __align__(16) unsigned char sharedBytes[];
    if (!allowsNextLate) {  // late is when this CTA ends
        allowDependentLaunch();
    }
    uint32_t const rank = clusterRank();
    openMailbox(reinterpret_cast<uint64_t*>(sharedBytes), rank);
    int const warp = threadIdx.x / kWARP_SIZE;
    int const lane = threadIdx.x % kWARP_SIZE;
    int const g = lane / 4;
    int const t = lane % 4;
    int const sequence = blockIdx.z;
    int const kvHead = blockIdx.y;

    // What no kernel of this step writes comes while the one before still runs.
    int32_t const last = min(max(args.lastPositions[sequence], 0), args.capacity - 1);
    int64_t const cache =
        static_cast<int64_t>(sequence * args.kvHeads + kvHead) * args.capacity * HEAD;
    OldRows<T, HEAD> const rows{static_cast<T*>(args.keys) + cache + g * HEAD + t * kCHUNK,
                                static_cast<T*>(args.values) + cache + 2 * t * HEAD + g * kCHUNK,
                                last, older};
    int32_t const slot = warp * kRANKS + static_cast<int>(rank);       // short texts use all ranks
    int32_t position = (max(last - older, 0) / kTILE + slot) * kTILE;  // of the tile at hand
    // Registers that turning queries takes are not there for values: they come as far as the L2.
    constexpr bool loadsValuesAhead = HEAD == 64 || DEPTH > 1;
    Tile<T, HEAD> tiles[DEPTH];
#pragma unroll
    for (int d = 0; d < DEPTH; ++d) {
        tiles[d].loadKeys(rows, position + d * kSTEP, g);
        if (loadsValuesAhead) {
            tiles[d].loadValues(rows, position + d * kSTEP, t);
        } else {
            prefetchValues(rows, position + d * kSTEP, lane);
        }
    }
    Turn<T, HEAD, WHOLE> turn;
    turn.load(args, last, t);

    waitForPredecessors();
    LaneQuery<HEAD> const laneQuery{
        sharedAddress(Exchange<HEAD>(sharedBytes, group).sumsOf(warp)) + 16 * lane, 64U * group,
        g < group};
    uint4 turned[HEAD / 32];
    turn.apply(
        turned, g < group,
        static_cast<T const*>(args.q) + sequence * args.queryStride + (kvHead * group + g) * HEAD,
        t);
    laneQuery.store(turned);
    Softmax<T, HEAD> softmax;
    if (slot == kSLOTS - 1) {  // the warp with the fewest tiles
        int64_t const from = sequence * args.keyStride + kvHead * HEAD;
        uint4 values[HEAD / 64];
#pragma unroll
        for (int m = 0; m < HEAD / 64; ++m) {
            values[m] = loadActivationsWhere(
                true, static_cast<T const*>(args.v) + from + (g + 8 * m) * kCHUNK);
        }
        turn.apply(turned, true, static_cast<T const*>(args.k) + from, t);
        int64_t const row = static_cast<int64_t>(last) * HEAD;
        if (g == 0) {
#pragma unroll
            for (int i = 0; i < HEAD / 32; ++i) {
                *reinterpret_cast<uint4*>(rows.keys + row + 4 * i * kCHUNK) = turned[i];
            }
        }
        if (t == 0) {
#pragma unroll
            for (int m = 0; m < HEAD / 64; ++m) {
                *reinterpret_cast<uint4*>(rows.values + row + 8 * m * kCHUNK) = values[m];
            }
        }
        softmax.begin(scoreNewKey<T, HEAD>(laneQuery, turned) * scoreScale, values, t);
    } else {
        softmax.clear();
    }
    if (!loadsValuesAhead) {  // DEPTH is 1
        tiles[0].loadValues(rows, position, t);
    }

    while (position < rows.end) {
#pragma unroll
        for (int d = 0; d < DEPTH; ++d) {
            if (position >= rows.end) {
                break;
            }
            int32_t const next = position + DEPTH * kSTEP;
            float scores[4];
            scoreTile<T, HEAD>(scores, laneQuery, tiles[d]);
            tiles[d].loadKeys(rows, next, g);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                bool const isThere = rows.has(position + 8 * (i / 2) + 2 * t + i % 2);
                scores[i] = isThere ? scores[i] * scoreScale : lowest();
            }
            softmax.weigh(scores, t);
            softmax.add(tiles[d], scores);
            tiles[d].loadValues(rows, next, t);
            position += kSTEP;
        }
    }

    Exchange<HEAD> const exchange(sharedBytes, group);
    __syncwarp();  // sums take the place of queries
    storeWarp<T, HEAD>(exchange, softmax, warp, g, t);
    __syncthreads();
    if (rank == 0 && threadIdx.x == 0) {
        expectMail(exchange.mailbox, exchange.mailBytes());
    }
    __syncwarp();
    waitForOpenMailbox();
    sendSums<HEAD>(exchange, rank);
    if (rank == 0) {
        waitForMail(exchange.mailbox);
        storeResult<T, HEAD>(
            exchange, static_cast<T*>(args.y) +
                          static_cast<int64_t>(sequence * args.kvHeads + kvHead) * group * HEAD);
    }
#endif
}

template <typename T, int HEAD, bool WHOLE, int DEPTH>
cudaError_t launchShape(AttentionArgs const& args, bool allowsNextLate, cudaStream_t stream) {
    auto* const kernel = &attentionKernel<T, HEAD, WHOLE, DEPTH>;
    int const group = args.heads / args.kvHeads;
    int32_t const older = args.window > 0 ? args.window - 1 : args.capacity;
    size_t const sharedBytes = Exchange<HEAD>::bytes(group);
    if (sharedBytes > 48 * 1024) {
        cudaError_t const raised = cudaFuncSetAttribute(
            kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(sharedBytes));
        if (raised != cudaSuccess) {
            return raised;
        }
    }
    cudaLaunchAttribute attributes[2] = {};
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim.x = kRANKS;
    attributes[1].val.clusterDim.y = 1;
    attributes[1].val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim =
        dim3(kRANKS, static_cast<unsigned>(args.kvHeads), static_cast<unsigned>(args.batch));
    config.blockDim = dim3(kTHREADS);
    config.dynamicSmemBytes = sharedBytes;
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = 2;
    return cudaLaunchKernelEx(&config, kernel, args, group, older, args.scale * kLOG2_E,
                              allowsNextLate);
}

template <typename T, int HEAD, bool WHOLE>
cudaError_t launchDepth(AttentionArgs const& args, AttentionPlan const& plan, cudaStream_t stream) {
    bool const isLate = plan.allowsNextLate != 0;
    return plan.depth == 1 ? launchShape<T, HEAD, WHOLE, 1>(args, isLate, stream)
                           : launchShape<T, HEAD, WHOLE, 2>(args, isLate, stream);
}

template <typename T, int HEAD>
cudaError_t launchTurn(AttentionArgs const& args, AttentionPlan const& plan, cudaStream_t stream) {
    return args.rotary == HEAD ? launchDepth<T, HEAD, true>(args, plan, stream)
                               : launchDepth<T, HEAD, false>(args, plan, stream);
}

template <typename T>
cudaError_t launchType(AttentionArgs const& args, AttentionPlan const& plan, cudaStream_t stream) {
    return args.headSize == 64 ? launchTurn<T, 64>(args, plan, stream)
                               : launchTurn<T, 128>(args, plan, stream);
}

bool isAligned(void const* pointer) {
    return pointer != nullptr && reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

bool hasPointers(AttentionArgs const& args) {
    bool const hasTables = args.rotary == 0 || (isAligned(args.cosines) && isAligned(args.sines));
    return isAligned(args.q) && isAligned(args.k) && isAligned(args.v) && isAligned(args.keys) &&
           isAligned(args.values) && isAligned(args.y) && args.lastPositions != nullptr &&
           hasTables;
}

}  // namespace

bool attentionFits(AttentionArgs const& args, DeviceTraits const& device) {
    bool const isHalf = args.type == DType::kFLOAT16 || args.type == DType::kBFLOAT16;
    bool const hasHeads = args.kvHeads > 0 && args.heads > 0 && args.heads % args.kvHeads == 0 &&
                          args.heads / args.kvHeads <= kMOST_GROUP && args.kvHeads <= 0xffff;
    bool const hasRotary =
        args.rotary == 0 || (args.rotary > 0 && args.rotary % (2 * kCHUNK) == 0 &&
                             args.rotary <= args.headSize && args.positions > 0);
    return device.computeCapability >= 90 && isHalf && hasHeads && hasRotary &&
           (args.headSize == 64 || args.headSize == 128) && args.capacity > 0 && args.batch >= 0 &&
           args.batch <= 0xffff && args.queryStride % kCHUNK == 0 && args.keyStride % kCHUNK == 0;
}

cudaError_t launchAttention(AttentionArgs const& args, DeviceTraits const& device,
                            cudaStream_t stream) {
    return launchAttentionWithPlan(args, AttentionPlan{}, device, stream);
}

cudaError_t launchAttentionWithPlan(AttentionArgs const& args, AttentionPlan const& plan,
                                    DeviceTraits const& device, cudaStream_t stream) {
    if (!attentionFits(args, device) || plan.depth < 1 || plan.depth > 2) {
        return cudaErrorInvalidValue;
    }
    if (args.batch == 0) {
        return cudaSuccess;
    }
    if (!hasPointers(args)) {
        return cudaErrorInvalidValue;
    }
    return args.type == DType::kFLOAT16 ? launchType<__half>(args, plan, stream)
                                        : launchType<__nv_bfloat16>(args, plan, stream);
}

}  // namespace nmexport::cuda
