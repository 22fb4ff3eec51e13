// cuBLASLt with its heuristics exhausted, as the dense rival: y[1, O] = x[1, K] @ W, with W as [K,
// O] or as [O, K].
#include <cublasLt.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

namespace {

constexpr size_t kWORKSPACE_BYTES = size_t{64} << 20;

struct Problem {
    cublasLtHandle_t handle{};
    cublasLtMatmulDesc_t product{};
    cublasLtMatrixLayout_t w{};
    cublasLtMatrixLayout_t x{};
    cublasLtMatrixLayout_t y{};
    void* workspace{};
    std::vector<cublasLtMatmulHeuristicResult_t> algorithms;
};

}  // namespace

extern "C" {

//! A bf16 product with float32 accumulation; `isTransposed` for W stored [O, K]. Never freed: a lab
//! lives briefly.
Problem* ltOpen(int tokens, int channels, int outputs, int isTransposed, int wanted) {
    auto* const p = new Problem;
    // Column-major views: [K, O] row-major is an O x K matrix, [O, K] row-major a K x O one.
    cublasOperation_t const op = isTransposed != 0 ? CUBLAS_OP_T : CUBLAS_OP_N;
    bool ok = cublasLtCreate(&p->handle) == CUBLAS_STATUS_SUCCESS &&
              cublasLtMatmulDescCreate(&p->product, CUBLAS_COMPUTE_32F, CUDA_R_32F) ==
                  CUBLAS_STATUS_SUCCESS &&
              cublasLtMatmulDescSetAttribute(p->product, CUBLASLT_MATMUL_DESC_TRANSA, &op,
                                             sizeof(op)) == CUBLAS_STATUS_SUCCESS &&
              cublasLtMatrixLayoutCreate(&p->w, CUDA_R_16BF, isTransposed != 0 ? channels : outputs,
                                         isTransposed != 0 ? outputs : channels,
                                         isTransposed != 0 ? channels : outputs) ==
                  CUBLAS_STATUS_SUCCESS &&
              cublasLtMatrixLayoutCreate(&p->x, CUDA_R_16BF, channels, tokens, channels) ==
                  CUBLAS_STATUS_SUCCESS &&
              cublasLtMatrixLayoutCreate(&p->y, CUDA_R_16BF, outputs, tokens, outputs) ==
                  CUBLAS_STATUS_SUCCESS &&
              cudaMalloc(&p->workspace, kWORKSPACE_BYTES) == cudaSuccess;
    cublasLtMatmulPreference_t preference{};
    ok = ok && cublasLtMatmulPreferenceCreate(&preference) == CUBLAS_STATUS_SUCCESS &&
         cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                              &kWORKSPACE_BYTES,
                                              sizeof(kWORKSPACE_BYTES)) == CUBLAS_STATUS_SUCCESS;
    p->algorithms.resize(static_cast<size_t>(wanted));
    int found = 0;
    ok = ok && cublasLtMatmulAlgoGetHeuristic(p->handle, p->product, p->w, p->x, p->y, p->y,
                                              preference, wanted, p->algorithms.data(),
                                              &found) == CUBLAS_STATUS_SUCCESS;
    p->algorithms.resize(static_cast<size_t>(ok ? found : 0));
    return p;
}

int ltCount(Problem const* p) {
    return static_cast<int>(p->algorithms.size());
}

int ltRun(Problem const* p, int algorithm, void const* x, void const* w, void* y,
          cudaStream_t stream) {
    float const one = 1.0F;
    float const zero = 0.0F;
    return cublasLtMatmul(p->handle, p->product, &one, w, p->w, x, p->x, &zero, y, p->y, y, p->y,
                          &p->algorithms[static_cast<size_t>(algorithm)].algo, p->workspace,
                          kWORKSPACE_BYTES, stream);
}

}  // extern "C"
