// CachedAttention by way of ONNX Runtime's own GroupQueryAttention: its kernel of the provider that
// runs the node, made and invoked through the C API.
#pragma once

#include <array>
#include <cstddef>
#include <optional>

#include "custom_op.h"

namespace nmexport {

namespace CachedAttentionInput {
enum : std::size_t {
    kQUERIES,
    kKEYS,
    kVALUES,
    kPAST_KEYS,
    kPAST_VALUES,
    kLAST_POSITIONS,
    kTOTAL_LENGTH,
    kCOSINES,
    kSINES,
    kCOUNT
};
}

// Attributes of the node, as GroupQueryAttention has them.
struct AttentionAttributes {
    std::int64_t heads;
    std::int64_t kvHeads;
    std::int64_t window;  // -1: all positions
    bool hasRotary;
    std::optional<float> scale;  // none: one over the root of the head size
};

// Tensors of one run; a null input is absent.
struct AttentionValues {
    std::array<const OrtValue*, CachedAttentionInput::kCOUNT> inputs{};
    std::array<OrtValue*, 3> outputs{};
    Shape queries;  // [B, S, H * D], or [B, S, (H + 2 * H_kv) * D] where they hold keys and values
    Shape caches;   // [B, H_kv, C, D]
};

class AttentionKernel : public Kernel {
  public:
    AttentionKernel(const OrtApi& api, const OrtKernelInfo* info, ElementType type);
    ~AttentionKernel() override;
    AttentionKernel(const AttentionKernel&) = delete;
    AttentionKernel& operator=(const AttentionKernel&) = delete;

    void run(OrtKernelContext* context) const override;

  protected:
    const OrtApi& api() const { return mApi; }
    const AttentionAttributes& attributes() const { return mAttributes; }

    // Takes the inputs and makes the outputs; throws Fault where shapes do not fit each other.
    AttentionValues valuesOf(OrtKernelContext* context) const;
    // Computes the outputs with the runtime's kernel.
    void invoke(OrtKernelContext* context, const AttentionValues& values) const;

  private:
    void checkShapes(const AttentionValues& values) const;

    const OrtApi& mApi;
    AttentionAttributes mAttributes;
    OrtOp* mOp = nullptr;
};

}  // namespace nmexport
