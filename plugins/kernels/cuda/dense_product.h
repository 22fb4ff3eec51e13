// product = s @ W through cuBLASLt, which is loaded when it is first needed.
//
// Nothing is linked to cuBLASLt: decoding does without it, and a plan that embeds the plugin must
// load where only the decode path is used.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <memory>

#include "nm_cuda.h"

namespace nmexport::cuda {

// What cuBLASLt may use for itself, of the workspace; NVIDIA's own advice for Hopper and later,
// more than enough before.
inline constexpr std::size_t kPRODUCT_WORKSPACE_BYTES = std::size_t{32} << 20;

struct ProductShape {
    DType type{DType::kFLOAT32};
    std::int64_t tokens{0};
    std::int64_t channels{0};
    std::int64_t outputs{0};
    bool floatResult{true};        // float32 for an epilogue to read, or T, rounded once
    std::int64_t resultStride{0};  // elements from one token's result to the next's; 0: outputs

    bool operator==(const ProductShape& other) const {
        return type == other.type && tokens == other.tokens && channels == other.channels &&
               outputs == other.outputs && floatResult == other.floatResult &&
               resultStride == other.resultStride;
    }
};

// The products of one node; not shared between threads.
class DenseProduct {
  public:
    DenseProduct();
    ~DenseProduct();
    DenseProduct(const DenseProduct&) = delete;
    DenseProduct& operator=(const DenseProduct&) = delete;

    // Chooses the kernel for a shape, on the host. Throws Fault where cuBLASLt is missing or has
    // no kernel.
    void prepare(const ProductShape& shape);

    // Enqueues result [tokens, outputs] = s [tokens, channels] @ w [channels, outputs], the
    // result's rows at their stride; neither allocates nor synchronises. Throws Fault.
    void enqueue(const ProductShape& shape, const void* s, const void* w, void* result,
                 void* workspace, cudaStream_t stream);

  private:
    struct State;
    std::unique_ptr<State> mState;
};

}  // namespace nmexport::cuda
