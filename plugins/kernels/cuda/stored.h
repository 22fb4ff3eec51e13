// Linears on rows of W as they are stored: a few tokens by one kernel that turns integers into T in
// registers, many by a dense product on tiles of W that are widened first.
#pragma once

#include "nm_cuda.h"

namespace nmexport::cuda {

//! Most tokens that launchStored takes. Up to kMAX_PRUNED_TOKENS each reads its own kept rows; more
//! go eight at a time, which read the rows that any of the eight keeps once. Of 32 the product of
//! widened rows was faster on an H200.
inline constexpr int32_t kMAX_STORED_TOKENS = 16;

//! What launchMask found out about each token, for the sums of what it kept.
struct TokenCorrections {
    float const* eta{nullptr};  //!< [tokens], with dynamicShift
    float const* nu{nullptr};   //!< [tokens], with varianceCorrection
};

//! Least compute capability of launchStored: that of its tensor cores' products.
inline constexpr int32_t kSTORED_CAPABILITY = 80;

//! Whether launchStored can run this linear: stored weights, 16-bit T, rows on 16 bytes, channels
//! in sixteens, groups of a power of two. Null pointers count as aligned.
bool hasStoredRows(LinearArgs const& args);

//! The logarithm of the channels in a group; of more than any K has where G is 1.
int32_t groupShiftOf(LinearArgs const& args);

//! The plan that launchStored uses: a rule that gives what was fastest on an H200.
DecodePlan storedPlan(LinearArgs const& args, DeviceTraits const& device);

//! Enqueues y = nu * (x @ W) + eta * shiftWeight + bias. x is s already, whatever the selection
//! says: of it only dynamicShift and varianceCorrection are read. cudaErrorInvalidValue unless
//! hasStoredRows and 1 <= tokens <= kMAX_STORED_TOKENS.
cudaError_t launchStored(LinearArgs const& args, TokenCorrections const& corrections,
                         DeviceTraits const& device, cudaStream_t stream);

//! The same with a given plan: lanesPerRow 8, vectors 1, and warps and unroll of kSTORED_SHAPES.
cudaError_t launchStoredWithPlan(LinearArgs const& args, TokenCorrections const& corrections,
                                 DecodePlan const& plan, DeviceTraits const& device,
                                 cudaStream_t stream);

//! A compiled shape for one token; 16 warps for integers of 4 bits alone. There, eight loads are of
//! half the bytes, so that a block has half the columns.
struct StoredPlanShape {
    int32_t warps;
    int32_t unroll;
};

inline constexpr StoredPlanShape kSTORED_SHAPES[] = {{4, 8}, {8, 8}, {8, 4}, {16, 4}};

constexpr bool hasShape(WeightType type, StoredPlanShape const& shape) {
    return shape.warps < 16 || type == WeightType::kINT4 || type == WeightType::kUINT4;
}

//! The one shape of eight tokens.
inline constexpr StoredPlanShape kEIGHT_TOKENS{8, 8};

//! Warps of one or of eight tokens that a multiprocessor holds: what registers leave room for.
//! Integers of 4 bits have twice the sums, and eight tokens twice the loads in flight.
constexpr int32_t residentStoredWarps(WeightType type, bool hasOneToken) {
    bool const isNarrow = type == WeightType::kINT4 || type == WeightType::kUINT4;
    return isNarrow && !hasOneToken ? 8 : 16;
}

//! Columns [first, first + columns) of W in T, each rounded once.
struct WidenArgs {
    DType type{DType::kFLOAT32};
    int32_t channels{0};     //!< K
    int32_t outputs{0};      //!< O
    void const* w{nullptr};  //!< [K, O] as stored
    StoredWeights stored{};
    int32_t firstColumn{0};  //!< even
    int32_t columns{0};
    void* to{nullptr};  //!< [K, columns] T
};

//! Enqueues the widening of a tile of W, of any shape.
cudaError_t launchWiden(WidenArgs const& args, cudaStream_t stream);

}  // namespace nmexport::cuda
