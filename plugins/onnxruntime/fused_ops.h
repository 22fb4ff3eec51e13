// The ops of domain nmexport.fused, which only the graph made for the CUDA provider uses:
//
//   GatedSilu(X [..., 2 * I]) -> Y [..., I]                       Y = silu(X[:I]) * X[I:]
//   GatedSiluPair(gate, up [..., I]) -> Y [..., I]                 Y = silu(gate) * up
//   ResidualNorm(X, skip [..., K], weight [K]; epsilon)
//       -> Y, sum [..., K]         sum = X + skip,  Y = sum / rms(sum, epsilon) * weight
//
// Their function bodies in the file say the same in standard ops.
#pragma once

#include <onnxruntime_c_api.h>

namespace nmexport {

// Registers the domain with a session.
void registerFusedOps(const OrtApi& api, OrtSessionOptions* options);

}  // namespace nmexport
