// Attention of one new token per sequence over a cache that is written in place, as one kernel in
// the chain of dependent launches:
//
//   linear q|k|v ──► attention: rotary, cache append, softmax(q · K) · V ──► linear o ──►
//
// Eight CTAs share a sequence's head of keys, one cluster; each of their 64 warps takes every 64th
// tile of 16 positions. What a warp computes depends on its own sequence's length alone: not on the
// capacity, the batch, or the neighbours.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "nm_cuda.h"

namespace nmexport::cuda {

//! y = softmax(scale * rotary(q) · K^T) · V, where K and V are the cache's rows of positions before
//! the new token's, within the window, and the new token's own. Rotated values are rounded to T;
//! the softmax is computed in float32, its weights are rounded to T.
//!
//! Old rows of the caches, the tables and lastPositions are read while the kernel before may still
//! run: no kernel of the same step may write them. Rows behind the new token's are never read.
struct AttentionArgs {
    DType type{DType::kFLOAT16};
    int32_t batch{0};
    int32_t heads{0};        //!< of queries, H
    int32_t kvHeads{0};      //!< of keys and values, H_kv; divides H
    int32_t headSize{0};     //!< D
    int32_t capacity{0};     //!< positions that a cache has room for, C
    int32_t window{-1};      //!< positions that a token sees, itself included; below 1: all
    int32_t rotary{0};       //!< elements of a head that are turned, R: halves, not pairs
    int32_t positions{0};    //!< rows of the tables, P
    float scale{0.0F};       //!< of the scores
    int64_t queryStride{0};  //!< elements from a sequence's queries to the next one's
    int64_t keyStride{0};    //!< the same of keys, and of values
    void const* q{nullptr};  //!< [batch, H, D] T at that stride
    void const* k{nullptr};  //!< [batch, H_kv, D] T
    void const* v{nullptr};  //!< the same
    void* keys{nullptr};     //!< [batch, H_kv, C, D] T
    void* values{nullptr};   //!< the same
    int32_t const* lastPositions{nullptr};  //!< [batch] the new token's, in 0 .. C-1 and below P
    void const* cosines{nullptr};           //!< [P, R / 2] T, needed with rotary
    void const* sines{nullptr};             //!< the same
    void* y{nullptr};                       //!< [batch, H, D] T, dense
};

//! How the kernel runs; no result depends on it.
struct AttentionPlan {
    //! Tiles of a warp in flight: 1 leaves half of a multiprocessor's registers to other kernels,
    //! such as the linear before, so that caches are read while that still runs. 2 takes them all.
    int32_t depth{1};
    //! 1: the next kernel starts when CTAs end, and finds all multiprocessors free; 0: at once.
    int32_t allowsNextLate{0};
};

//! True where launchAttention computes this: a 16-bit type, heads of 64 or 128 elements, at most 8
//! heads of queries to one of keys, a rotary part that is a multiple of 16, and compute capability
//! 9.0. Looks at no pointer.
bool attentionFits(AttentionArgs const& args, DeviceTraits const& device);

//! Enqueues it. cudaErrorInvalidValue where it does not fit, or a pointer is null or not aligned
//! to 16 bytes.
cudaError_t launchAttention(AttentionArgs const& args, DeviceTraits const& device,
                            cudaStream_t stream);

//! The same with a given plan, for benchmarks.
cudaError_t launchAttentionWithPlan(AttentionArgs const& args, AttentionPlan const& plan,
                                    DeviceTraits const& device, cudaStream_t stream);

}  // namespace nmexport::cuda
