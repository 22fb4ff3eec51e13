// What lies between the linears of a decoder layer, one kernel each, in the chain of dependent
// launches: the residual sum with its norm, and the gated activation.
//
//   attention ──► linear o ──► addAndNormalise ──► linear gate|up ──► gatedSilu ──► linear down ──►
//
// Each kernel may start while the one before it still runs, waits for it before it reads, and lets
// the next one start at once. Where the linear behind is sparse, the kernel writes the row that
// this linear multiplies: gathered by its channel order and pruned, so that no pass is made for
// that.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "nm_cuda.h"

namespace nmexport::cuda {

//! sum = x + skip, rounded to T;  y = sum / sqrt(mean(sum^2) + epsilon) * weight
struct NormArgs {
    DType type{DType::kFLOAT32};
    int64_t tokens{0};
    int32_t channels{0};  //!< K
    float epsilon{0.0F};
    void const* x{nullptr};       //!< [tokens, K]
    void const* skip{nullptr};    //!< [tokens, K], or null: sum is x
    void const* weight{nullptr};  //!< [K]
    void* y{nullptr};             //!< [tokens, K]; s, by position, where it is pruned
    void* sum{nullptr};           //!< [tokens, K], or null: not wanted
    bool isPruned{false};         //!< y is given to a linear of this selection, see canPrune
    Selection selection{};
};

//! y = g * sigmoid(g) * u, in float32, rounded once
struct GatedSiluArgs {
    DType type{DType::kFLOAT32};
    int64_t tokens{0};
    int32_t channels{0};        //!< I
    int64_t stride{0};          //!< elements from a token's first g (and u) to the next token's
    void const* gate{nullptr};  //!< [tokens, I] at that stride
    void const* up{nullptr};    //!< the same
    void* y{nullptr};           //!< [tokens, I], dense; s, by position, where it is pruned
    bool isPruned{false};       //!< y is given to a linear of this selection, see canPrune
    Selection selection{};
};

//! Most channels of a row that is pruned where it is made: it lies in shared memory.
inline constexpr int32_t kMAX_PRUNED_CHANNELS = 16384;

//! Whether a row can be pruned where it is made: a 16-bit type in groups of 16, no statistic of the
//! token, constants on 16 bytes.
bool canPrune(DType type, int32_t channels, Selection const& selection);

//! Whether launchPrune takes these rows: few, or in an order; that canPrune holds for, on 16 bytes,
//! s by position, no mask asked for.
bool canPruneInChain(MaskArgs const& args);

//! Enqueues what launchMask does, in the chain of dependent launches. cudaErrorInvalidValue unless
//! canPruneInChain.
cudaError_t launchPrune(MaskArgs const& args, DeviceTraits const& device, cudaStream_t stream);

//! Enqueues the norm. cudaErrorInvalidValue unless K is a multiple of 8.
cudaError_t launchNorm(NormArgs const& args, DeviceTraits const& device, cudaStream_t stream);

//! Enqueues the gated activation. cudaErrorInvalidValue unless I and the stride
//! are multiples of 8.
cudaError_t launchGatedSilu(GatedSiluArgs const& args, DeviceTraits const& device,
                            cudaStream_t stream);

}  // namespace nmexport::cuda
