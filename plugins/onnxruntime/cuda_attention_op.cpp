// CachedAttention for the CUDA provider: a step of one token by our kernel, all else by the
// runtime's.
#include <cuda_runtime_api.h>

#include <cmath>

#include "attention.h"
#include "cuda_device.h"
#include "cuda_fault.h"
#include "fused_op.h"
#include "runtime_attention.h"

namespace nmexport {

namespace {

using namespace CachedAttentionInput;

class CudaAttentionKernel : public AttentionKernel {
  public:
    CudaAttentionKernel(const OrtApi& api, const OrtKernelInfo* info, ElementType type)
        : AttentionKernel(api, info, type), mType(type) {}

    void run(OrtKernelContext* context) const override {
        const AttentionValues values = valuesOf(context);
        const cuda::AttentionArgs args = argumentsOf(values);
        const bool isStep = values.queries[1] == 1 && isInPlace(values);
        if (!isStep || !cuda::attentionFits(args, currentDevice())) {
            invoke(context, values);
            return;
        }
        cuda::checkCuda(cuda::launchAttention(args, currentDevice(), streamOf(api(), context)),
                        "the attention's kernel");
    }

  private:
    const void* input(const AttentionValues& values, std::size_t index) const {
        const OrtValue* value = values.inputs[index];
        return value == nullptr ? nullptr : dataOf(api(), value);
    }

    bool isInPlace(const AttentionValues& values) const {
        return input(values, kPAST_KEYS) == dataOf(api(), values.outputs[1]) &&
               input(values, kPAST_VALUES) == dataOf(api(), values.outputs[2]);
    }

    cuda::AttentionArgs argumentsOf(const AttentionValues& values) const {
        const std::int64_t headSize = values.caches[3];
        cuda::AttentionArgs args;
        args.type = elementOf(mType);
        args.batch = static_cast<std::int32_t>(values.queries[0]);
        args.heads = static_cast<std::int32_t>(attributes().heads);
        args.kvHeads = static_cast<std::int32_t>(attributes().kvHeads);
        args.headSize = static_cast<std::int32_t>(headSize);
        args.capacity = static_cast<std::int32_t>(values.caches[2]);
        args.window = static_cast<std::int32_t>(attributes().window);
        args.scale = attributes().scale.value_or(1.0f / std::sqrt(static_cast<float>(headSize)));
        args.keys = dataOf(api(), values.outputs[1]);
        args.values = dataOf(api(), values.outputs[2]);
        args.lastPositions = static_cast<const std::int32_t*>(input(values, kLAST_POSITIONS));
        args.y = dataOf(api(), values.outputs[0]);
        setNewToken(values, args);
        setTables(values, args);
        return args;
    }

    void setNewToken(const AttentionValues& values, cuda::AttentionArgs& args) const {
        const std::int64_t width = attributes().heads * args.headSize;
        const std::int64_t kvWidth = attributes().kvHeads * args.headSize;
        args.q = input(values, kQUERIES);
        args.queryStride = values.queries[2];
        if (values.inputs[kKEYS] != nullptr) {
            args.k = input(values, kKEYS);
            args.v = input(values, kVALUES);
            args.keyStride = kvWidth;
            return;
        }
        const std::int64_t bytes = mType == ElementType::kFLOAT32 ? 4 : 2;
        args.k = static_cast<const char*>(args.q) + width * bytes;
        args.v = static_cast<const char*>(args.k) + kvWidth * bytes;
        args.keyStride = args.queryStride;
    }

    void setTables(const AttentionValues& values, cuda::AttentionArgs& args) const {
        if (!attributes().hasRotary) return;
        args.cosines = input(values, kCOSINES);
        args.sines = input(values, kSINES);
        if (args.cosines == nullptr || args.sines == nullptr) {
            throw Fault("CachedAttention: do_rotary is 1, and there are no cosines and sines");
        }
        const Shape table = shapeOf(api(), values.inputs[kCOSINES]);
        if (table.size() != 2 || shapeOf(api(), values.inputs[kSINES]) != table) {
            throw Fault("CachedAttention: cosines and sines need one shape, [positions, R / 2]");
        }
        args.positions = static_cast<std::int32_t>(table[0]);
        args.rotary = static_cast<std::int32_t>(2 * table[1]);
    }

    ElementType mType;
};

}  // namespace

std::unique_ptr<Kernel> makeCudaAttentionKernel(const OrtApi& api, const OrtKernelInfo* info,
                                                ElementType type) {
    return std::make_unique<CudaAttentionKernel>(api, info, type);
}

}  // namespace nmexport
