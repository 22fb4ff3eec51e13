// NMLinear on a GPU for any number of tokens, the same for every framework: sparse or dense, where
// the workspace's parts lie, what is launched.
//
//   few tokens:  x -> decode kernel over the kept rows of W -> y
//   many:        x -> mask kernel -> s -> cuBLASLt with W -> product -> epilogue kernel -> y
//
// Where s would be x itself, and where y would be the product itself or that and a bias, which
// cuBLASLt adds, that kernel is left out.
//
// Where W is stored as integers or 8-bit floats:
//
//   few tokens:  x -> mask kernel -> s -> decode kernel over stored rows -> y
//   many:        for each tile of W's columns: widened to T in the workspace, cuBLASLt, and so on;
//                a widened weight is rounded to T
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>

#include "dense_product.h"
#include "nm_cuda.h"
#include "stored.h"

namespace nmexport::cuda {

// What decides the path and the workspace: known before any pointer is.
struct LinearWork {
    DType type{DType::kFLOAT32};
    std::int64_t tokens{0};
    std::int32_t channels{0};  // K
    std::int32_t outputs{0};   // O
    bool needsMask{true};      // s is not x
    bool needsEpilogue{true};  // y is not the product and a bias
    bool hasBias{false};
    bool isPruned{false};  // x is s already
    // A kernel of its own gathers and prunes a few tokens' x before the decode kernel: the blocks
    // of that, hundreds, would all gather the same few kilobytes.
    bool prunesFirst{false};
    WeightType weights{WeightType::kT};
    std::int64_t tileBytes{0};  // most of W that is widened at a time; 0: the executor's choice
    bool hasStoredRows{false};  // the kernel for stored rows takes them
};

LinearWork workOf(const LinearArgs& args);

enum class LinearPath {
    kFASTER,   // the decode kernel for few tokens, where it was measured to be faster
    kPRODUCT,  // mask and dense product, even for few tokens
};

// Device memory that a run needs, for these tokens and for fewer; 0 for the decode kernel.
std::size_t workspaceBytes(const LinearWork& work, const DeviceTraits& device, LinearPath path);

// One node; safe to run from several threads at once.
class LinearExecutor {
  public:
    // Chooses the dense product's kernel, on the host and outside of any capture, where the path
    // needs one; else the first run does. Throws Fault where cuBLASLt is missing.
    void prepare(const LinearWork& work, const DeviceTraits& device, LinearPath path);

    // Enqueues; neither allocates device memory nor synchronises. Throws Fault.
    void run(const LinearArgs& args, const DeviceTraits& device, LinearPath path, void* workspace,
             cudaStream_t stream);

  private:
    void runStored(const LinearArgs& args, const DeviceTraits& device, void* workspace,
                   cudaStream_t stream);
    void multiply(const LinearArgs& args, const void* s, void* product, void* workspace,
                  cudaStream_t stream);
    void runProduct(const LinearArgs& args, const DeviceTraits& device, void* workspace,
                    cudaStream_t stream);

    std::mutex mMutex;  // of the product alone: it remembers kernels by shape
    DenseProduct mProduct;
};

}  // namespace nmexport::cuda
