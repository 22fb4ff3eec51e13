// N:M activation-sparse linear layers on CUDA: raw device pointers, sizes, a stream; no framework
// header.
//
// Every function enqueues on the stream and returns at once: nothing allocates, synchronises or
// throws, so calls may be captured into a CUDA graph. The mathematics is that of the op contract of
// `NMPrune` and `NMLinear`, version 2.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace nmexport::cuda {

enum class DType : int32_t {
    kFLOAT32 = 0,
    kFLOAT16 = 1,
    kBFLOAT16 = 2,
};

//! What W is stored as: elements of T, or integers and 8-bit floats with scales.
enum class WeightType : int32_t {
    kT = 0,
    kINT8 = 1,
    kINT4 = 2,    //!< two a byte along O, the lower column in the low half; O is even
    kUINT4 = 3,   //!< the same
    kFLOAT8 = 4,  //!< float8e4m3fn
};

inline constexpr int32_t kMAX_GROUP = 64;
//! Most tokens that the decode kernel takes; above it: launchMask, a dense product, launchEpilogue.
inline constexpr int32_t kMAX_DECODE_TOKENS = 4;

//! How one group is ranked. A position is a channel's place in the order, where there is one: x is
//! gathered first, everything else of K elements lies by position. All pointers are device
//! pointers; null where the option is unused. The arrays are constants: launchDecode reads them
//! while the kernel before it may still run, so nothing in the stream may write them, and
//! channelOrder must be a permutation of 0 .. K-1, which no kernel checks.
struct Selection {
    int32_t n{8};   //!< kept per group, 1 <= n <= m; n == m keeps everything (dense)
    int32_t m{16};  //!< group size, 1..kMAX_GROUP, divides the channel count
    float const* scoreScale{nullptr};      //!< [K] factor of |z|
    int32_t const* channelOrder{nullptr};  //!< [K] permutation: position -> channel of x
    float const* valueScale{nullptr};  //!< [K] multiplies kept values; scores and nu do not see it
    float const* shift{nullptr};       //!< [shiftLength] subtracted before ranking
    int32_t shiftLength{0};            //!< 0 (none), 1 (scalar) or K (per channel)
    bool dynamicShift{false};          //!< subtract the token's mean; excludes `shift`
    bool varianceCorrection{false};    //!< report nu = sqrt(var(z) / max(var(s), 1e-12))
};

//! s = z where kept, else 0, for any number of tokens (prefill, and NMPrune with a bare Selection).
struct MaskArgs {
    DType type{DType::kFLOAT32};
    int64_t tokens{0};
    int32_t channels{0};  //!< K
    Selection selection{};
    void const* x{nullptr};  //!< [tokens, K] T
    bool isGathered{false};  //!< s and keep lie by position, as rows of W do; else by channel
    void* s{nullptr};        //!< [tokens, K] T; may be x where nothing shifts and s lies by channel
    uint8_t* keep{nullptr};  //!< [tokens, K] 1 where kept; optional
    float* eta{nullptr};     //!< [tokens] the dynamic shift; required with dynamicShift
    float* nu{nullptr};      //!< [tokens] the variance correction; required with varianceCorrection
};

//! y = nu * product + eta * shiftWeight + bias: what follows a dense product of launchMask's s with
//! W.
struct EpilogueArgs {
    DType type{DType::kFLOAT32};
    int64_t tokens{0};
    int32_t outputs{0};                 //!< O
    float const* product{nullptr};      //!< [tokens, O] s @ W, float32
    float const* eta{nullptr};          //!< [tokens], optional
    float const* nu{nullptr};           //!< [tokens], optional
    float const* shiftWeight{nullptr};  //!< [O], needed with eta
    void const* bias{nullptr};          //!< [O] T, optional
    void* y{nullptr};                   //!< [tokens, O] T
};

//! How W is stored. Of a type other than kT, the weight of channel k and output o is
//! (w[k, o] - zeroPoint[g, o]) * scale[g, o] with g = k / (K / groups). The arrays are constants,
//! like those of a Selection.
struct StoredWeights {
    WeightType type{WeightType::kT};
    int32_t groups{1};               //!< G: 1, or K / G is a multiple of 16
    void const* scale{nullptr};      //!< [G, O] T or float32
    bool scaleIsT{false};            //!< the scales are T's, else float32's
    void const* zeroPoint{nullptr};  //!< [G, O] of W's type, packed as W is, or float32; optional
    bool zeroPointIsFloat{false};    //!< the zero points are float32's; of integers alone
};

//! The whole NMLinear. launchDecode takes 1..kMAX_DECODE_TOKENS tokens and does it in one launch:
//! selection, product over kept rows, corrections; LinearExecutor takes any number.
struct LinearArgs {
    DType type{DType::kFLOAT32};
    int64_t tokens{1};
    int32_t channels{0};  //!< K
    int32_t outputs{0};   //!< O
    Selection selection{};
    void const* x{nullptr};             //!< [tokens, K] T
    void const* w{nullptr};             //!< [K, O] T or as stored, rows by position
    void const* bias{nullptr};          //!< [O] T, optional
    float const* shiftWeight{nullptr};  //!< [O], needed with dynamicShift
    void* y{nullptr};                   //!< [tokens, O] T
    bool isPruned{false};    //!< x is s already, by position, 16 bit; the selection keeps 16 of 16
    StoredWeights stored{};  //!< other than kT: for LinearExecutor, and launchStored of stored.h
    int64_t tileBytes{0};    //!< most of W that LinearExecutor widens at a time; 0: its own choice
};

//! Up to so many tokens of a pruned x are multiplied by their kept rows, each for itself: rows that
//! two of them keep are read from memory once, but pass the second-level cache twice.
inline constexpr int32_t kMAX_PRUNED_TOKENS = 2;

//! How the decode kernel cuts its work.
//!
//!       O ->   | tile 0 | tile 1 | ...   a tile is lanesPerRow * (16 bytes / sizeof(T)) columns
//!   K  rank 0  |  CTA   |  CTA   |       a CTA is `warps` warps, each with its own channels
//!   |  rank 1  |  CTA   |  CTA   |       `cluster` CTAs along K add up through distributed
//!   v  ...                               shared memory
struct DecodePlan {
    int32_t lanesPerRow{16};    //!< 8, 16 or 32 lanes share a row segment
    int32_t vectors{1};         //!< 16-byte vectors a lane reads of each row: 1 or 2
    int32_t warps{8};           //!< per CTA
    int32_t unroll{8};          //!< 16-byte loads in flight per lane
    int32_t overlap{0};         //!< 1: rank the next rows while some are in flight
    int32_t residentWarps{32};  //!< per multiprocessor, that the registers leave room for
    int32_t cluster{1};         //!< 1..8, cut down to what shared memory holds; above 1 from 9.0 on
    int32_t allowsNextLate{0};  //!< 1: the next kernel may start once all rows are read, 0: at once
};

//! What is known of the device; fill once with queryDevice and keep.
struct DeviceTraits {
    int32_t computeCapability{0};  //!< 10 * major + minor of the chip, or of older code
    int32_t multiprocessors{0};
    int32_t sharedBytesPerBlock{0};  //!< with opt-in
};

//! Reads the traits of the current device. An error where the library has no code for it.
cudaError_t queryDevice(DeviceTraits* traits);

//! The plan that launchDecode uses for a shape with groups of 16: from the table measured on this
//! chip, or by rule where there is none. `isGrouped`: with a channel order. Cluster 0: too little
//! shared memory for so many tokens.
DecodePlan decodePlan(DeviceTraits const& device, DType type, int32_t tokens, int32_t channels,
                      int32_t outputs, bool isGrouped = false);

//! True where launchDecode runs on this chip and is faster than launchMask and a dense product for
//! the same result.
bool decodeIsFaster(DeviceTraits const& device, DType type, int32_t tokens, int32_t channels,
                    int32_t outputs);

//! Puts measured rows in front of the compiled ones (see plan_table.h for the text form). 0, or the
//! faulty line.
int setPlanTable(char const* text);

//! Enqueues the masked activation. cudaErrorInvalidValue where an argument breaks a rule stated
//! above.
cudaError_t launchMask(MaskArgs const& args, cudaStream_t stream);

//! Enqueues the epilogue of a dense product.
cudaError_t launchEpilogue(EpilogueArgs const& args, cudaStream_t stream);

//! Enqueues the decode linear with the plan of decodePlan. Needs no workspace.
//! cudaErrorInvalidConfiguration where the chip has too little shared memory: four tokens on
//! compute capability 7.5.
cudaError_t launchDecode(LinearArgs const& args, DeviceTraits const& device, cudaStream_t stream);

//! The same with a given plan, for benchmarks and autotuners; cudaErrorInvalidValue where it was
//! not compiled.
cudaError_t launchDecodeWithPlan(LinearArgs const& args, DecodePlan const& plan,
                                 DeviceTraits const& device, cudaStream_t stream);

}  // namespace nmexport::cuda
