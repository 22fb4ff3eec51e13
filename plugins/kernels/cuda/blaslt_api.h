// The part of cuBLASLt's C interface that the product uses, for loading by name at run time.
//
// Declared here rather than included, so that building the plugin takes no cuBLAS package. Names
// and values are those of cublasLt.h, unchanged since CUDA 11.
#pragma once

#include <cuda_runtime_api.h>
#include <library_types.h>

#include <cstddef>
#include <cstdint>

namespace nmexport::cuda::blaslt {

using Status = int;
inline constexpr Status kSUCCESS = 0;     // CUBLAS_STATUS_SUCCESS
inline constexpr int kCOMPUTE_32F = 68;   // CUBLAS_COMPUTE_32F: float32 throughout, no TF32
inline constexpr int kMAX_WORKSPACE = 1;  // CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES
inline constexpr int kEPILOGUE = 7;       // CUBLASLT_MATMUL_DESC_EPILOGUE, int32
inline constexpr int kBIAS_POINTER = 8;   // CUBLASLT_MATMUL_DESC_BIAS_POINTER
inline constexpr std::int32_t kADD_BIAS =
    4;  // CUBLASLT_EPILOGUE_BIAS: one of D's rows, of D's type

struct Algorithm {  // cublasLtMatmulAlgo_t
    std::uint64_t data[8];
};

struct Heuristic {  // cublasLtMatmulHeuristicResult_t
    Algorithm algorithm;
    std::size_t workspaceBytes;
    Status state;
    float waves;
    int reserved[4];
};

using Handle = void*;      // cublasLtHandle_t
using Product = void*;     // cublasLtMatmulDesc_t
using Layout = void*;      // cublasLtMatrixLayout_t
using Preference = void*;  // cublasLtMatmulPreference_t

struct Api {
    Status (*create)(Handle*);
    Status (*destroy)(Handle);
    Status (*productCreate)(Product*, int computeType, cudaDataType_t scaleType);
    Status (*productDestroy)(Product);
    Status (*productSet)(Product, int attribute, const void* value, std::size_t bytes);
    Status (*layoutCreate)(Layout*, cudaDataType_t, std::uint64_t rows, std::uint64_t columns,
                           std::int64_t leading);
    Status (*layoutDestroy)(Layout);
    Status (*preferenceCreate)(Preference*);
    Status (*preferenceSet)(Preference, int attribute, const void* value, std::size_t bytes);
    Status (*preferenceDestroy)(Preference);
    Status (*heuristic)(Handle, Product, Layout a, Layout b, Layout c, Layout d, Preference,
                        int wanted, Heuristic*, int* found);
    Status (*matmul)(Handle, Product, const void* alpha, const void* a, Layout, const void* b,
                     Layout, const void* beta, const void* c, Layout, void* d, Layout,
                     const Algorithm*, void* workspace, std::size_t bytes, cudaStream_t);
};

// Loads the library once. Throws Fault where it cannot be found; a later call tries again.
const Api& api();

}  // namespace nmexport::cuda::blaslt
