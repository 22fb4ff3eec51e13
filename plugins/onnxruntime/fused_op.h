// The ops of domain nmexport.fused, which only graphs made for one provider use:
//
//   GatedSilu(X [..., 2 * I]) -> Y [..., I]                       Y = silu(X[:I]) * X[I:]
//   GatedSiluPair(gate, up [..., I]) -> Y [..., I]                 Y = silu(gate) * up
//   ResidualNorm(X, skip [..., K], weight [K]; epsilon)
//       -> Y, sum [..., K]         sum = X + skip,  Y = sum / rms(sum, epsilon) * weight
//   Likeliest(X [..., V]) -> ids [...] int64                      the largest's index in its row,
//                                                                 the first of equals, or of NaNs
//
// For the CUDA provider each of them has a form that prunes, with attributes n, m and phase and,
// behind the inputs above, the optional constants of a selection [K]: score_scale, channel_order,
// value_scale, shift [1 | K]. Y is then what a linear of this selection multiplies: gathered,
// shifted, pruned, scaled.
//
//   PrunedGatedSilu, PrunedGatedSiluPair, PrunedResidualNorm
//   SparseLinear(S [..., K], W [K, O], bias [O], weight_scale, weight_zero_point [G, O],
//                dense_bias [O]; phase)
//       -> Y [..., O]              Y = S @ W + bias; rows of W that meet zeros alone are not read
//
// W, its scales and zero points are those of NMLinear, and so is phase: tokens that it leaves dense
// are gathered alone, and get dense_bias in place of bias.
//
//   CachedAttention(queries, keys, values, past_keys, past_values [B, H_kv, C, D],
//                   last_positions [B], total_sequence_length, cosines, sines;
//                   num_heads, kv_num_heads, scale, local_window_size, do_rotary)
//       -> Y [B, S, H * D], present_keys, present_values
//
// is ONNX Runtime's GroupQueryAttention, attribute by attribute, and that is its function body;
// total_sequence_length is on the host. The CPU provider has it too.
//
// Function bodies in the file say the same in standard ops. For the CPU provider there are
//
//   Norm(X [..., K], weight [K]; epsilon) -> Y [..., K]
//   PagedAttention(queries [..., T, heads * D], keys, values, sequences [T], positions [T],
//                  pages [N, P], cosines, sines [positions, R / 2], past_keys, past_values;
//                  num_heads, kv_num_heads, scale, window)
//       -> Y [..., T, heads * D], present_keys, present_values
//
//   Region(values ...; nodes, outputs, node{i}_op, node{i}_inputs, node{i}_outputs, and node{i}_
//          with each attribute of node i) -> values ...
//
// PagedAttention is AttentionArguments of step.h. Without keys and values, queries are rows of all
// three. Caches are written in place where present ones are bound to the memory of past ones.
//
// A region is a run of these ops and of NMLinear, in order. Its values have numbers: first its own
// inputs, then what its nodes make, node after node. `inputs` of a node are such numbers, -1 where
// it has none; `outputs` of the region are those that leave it. All that NMLinear reads besides X
// is constant.
#pragma once

#include <string>

#include "cpu_kernels.h"

namespace nmexport {

inline constexpr const char* kFUSED_DOMAIN = "nmexport.fused";

struct FusedInput {
    InputType type = InputType::kT;
    bool optional = false;
    bool isOnHost = false;  // wherever the other inputs are
    // In place of `type`, where it is set.
    ONNXTensorElementDataType onnx = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
};

struct FusedSpec {
    std::string name;
    std::vector<FusedInput> inputs;
    std::size_t outputs;   // all of one type
    const char* provider;  // null is the CPU's
    KernelFactory factory;
    bool isVariadic = false;     // any inputs, of any types, and any number of outputs
    bool givesIntegers = false;  // outputs are int64, and not T
};

class FusedOp : public OrtCustomOp {
  public:
    FusedOp(FusedSpec spec, ElementType type);

  private:
    static const FusedOp& self(const OrtCustomOp* op) { return *static_cast<const FusedOp*>(op); }

    FusedSpec mSpec;
    ElementType mType;
};

// Computes it with ONNX Runtime's own kernel, on any provider; see runtime_attention.h.
std::unique_ptr<Kernel> makeAttentionKernel(const OrtApi& api, const OrtKernelInfo* info,
                                            ElementType type);
// CachedAttention for a provider, null being the CPU's.
FusedSpec cachedAttention(const char* provider, KernelFactory factory);

// The ops of the CPU provider, for sessions of such settings; they live as long as the library.
const std::vector<FusedOp>& cpuFusedOps(const SessionSettings& settings);

#if defined(NMEXPORT_HAS_CUDA)
const std::vector<FusedOp>& cudaFusedOps();
// Computes a step of one token with our kernel where that can.
std::unique_ptr<Kernel> makeCudaAttentionKernel(const OrtApi& api, const OrtKernelInfo* info,
                                                ElementType type);
std::unique_ptr<Kernel> makeCudaLikeliestKernel(const OrtApi& api, const OrtKernelInfo* info,
                                                ElementType type);
#endif

}  // namespace nmexport
