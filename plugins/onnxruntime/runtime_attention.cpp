#include "runtime_attention.h"

#include "fused_op.h"
#include "node.h"

namespace nmexport {

namespace {

using namespace CachedAttentionInput;

AttentionAttributes attributesOf(const NodeInfo& node) {
    AttentionAttributes attributes{};
    attributes.heads = node.integer("num_heads");
    attributes.kvHeads = node.integer("kv_num_heads");
    attributes.window = node.integer("local_window_size");
    attributes.hasRotary = node.integer("do_rotary") != 0;
    float scale = 0.0f;
    if (succeeded(node.api(),
                  node.api().KernelInfoGetAttribute_float(node.raw(), "scale", &scale))) {
        attributes.scale = scale;
    }
    if (attributes.kvHeads < 1 || attributes.heads < 1 ||
        attributes.heads % attributes.kvHeads != 0) {
        throw Fault("CachedAttention: " + std::to_string(attributes.heads) + " heads on " +
                    std::to_string(attributes.kvHeads) + "; allowed: a positive multiple");
    }
    return attributes;
}

// Attributes of an op that is about to be made.
class OpAttributes {
  public:
    explicit OpAttributes(const OrtApi& api) : mApi(api) {}
    OpAttributes(const OpAttributes&) = delete;
    OpAttributes& operator=(const OpAttributes&) = delete;
    ~OpAttributes() {
        for (OrtOpAttr* attribute : mAttributes) mApi.ReleaseOpAttr(attribute);
    }

    void add(const char* name, std::int64_t value) { add(name, &value, ORT_OP_ATTR_INT); }
    void add(const char* name, float value) { add(name, &value, ORT_OP_ATTR_FLOAT); }
    const OrtOpAttr* const* data() const { return mAttributes.data(); }
    int size() const { return static_cast<int>(mAttributes.size()); }

  private:
    void add(const char* name, const void* value, OrtOpAttrType type) {
        OrtOpAttr* attribute = nullptr;
        check(mApi, mApi.CreateOpAttr(name, value, 1, type, &attribute));
        mAttributes.push_back(attribute);
    }

    const OrtApi& mApi;
    std::vector<OrtOpAttr*> mAttributes;
};

OrtOp* makeOp(const OrtApi& api, const OrtKernelInfo* info, ElementType type,
              const AttentionAttributes& attributes) {
    OpAttributes given(api);
    given.add("num_heads", attributes.heads);
    given.add("kv_num_heads", attributes.kvHeads);
    given.add("local_window_size", attributes.window);
    given.add("do_rotary", static_cast<std::int64_t>(attributes.hasRotary));
    if (attributes.scale) given.add("scale", *attributes.scale);
    // Kernels are found by all their type constraints. Versions differ in those for caches of
    // integers; named alone, T would also find a kernel for such caches.
    const ONNXTensorElementDataType element = onnxType(type);
    const char* names[] = {"T", "M", "T_CACHE", "T_KV_SCALE"};
    const ONNXTensorElementDataType types[] = {element, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32,
                                               element, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT};
    OrtOp* op = nullptr;
    OrtStatus* status = nullptr;
    for (const int constraints : {4, 3, 2}) {
        if (status != nullptr) api.ReleaseStatus(status);
        status =
            api.CreateOp(info, "GroupQueryAttention", "com.microsoft", 1, names, types, constraints,
                         given.data(), given.size(), static_cast<int>(kCOUNT), 3, &op);
        if (status == nullptr) return op;
    }
    check(api, status);
    return nullptr;
}

}  // namespace

AttentionKernel::AttentionKernel(const OrtApi& api, const OrtKernelInfo* info, ElementType type)
    : mApi(api), mAttributes(attributesOf({api, info})) {
    mOp = makeOp(api, info, type, mAttributes);
}

AttentionKernel::~AttentionKernel() {
    mApi.ReleaseOp(mOp);
}

void AttentionKernel::run(OrtKernelContext* context) const {
    invoke(context, valuesOf(context));
}

AttentionValues AttentionKernel::valuesOf(OrtKernelContext* context) const {
    AttentionValues values;
    std::size_t count = 0;
    check(mApi, mApi.KernelContext_GetInputCount(context, &count));
    for (std::size_t i = 0; i < kCOUNT && i < count; ++i) {
        check(mApi, mApi.KernelContext_GetInput(context, i, &values.inputs[i]));
    }
    values.queries = shapeOf(mApi, values.inputs[kQUERIES]);
    values.caches = shapeOf(mApi, values.inputs[kPAST_KEYS]);
    checkShapes(values);
    const Shape y{values.queries[0], values.queries[1], mAttributes.heads * values.caches[3]};
    const std::array<const Shape*, 3> shapes{&y, &values.caches, &values.caches};
    for (std::size_t i = 0; i < shapes.size(); ++i) {
        check(mApi, mApi.KernelContext_GetOutput(context, i, shapes[i]->data(), shapes[i]->size(),
                                                 &values.outputs[i]));
    }
    return values;
}

void AttentionKernel::checkShapes(const AttentionValues& values) const {
    const Shape& queries = values.queries;
    const Shape& caches = values.caches;
    const std::int64_t kv = mAttributes.kvHeads;
    const bool isPacked = values.inputs[kKEYS] == nullptr;
    const std::int64_t heads = mAttributes.heads + (isPacked ? 2 * kv : 0);
    const bool fits = queries.size() == 3 && caches.size() == 4 &&
                      shapeOf(mApi, values.inputs[kPAST_VALUES]) == caches &&
                      caches[0] == queries[0] && caches[1] == kv && queries[2] == heads * caches[3];
    if (!fits) {
        throw Fault("CachedAttention: queries have shape " + textOf(queries) + " and caches " +
                    textOf(caches) + "; allowed: [B, S, " + std::to_string(heads) +
                    " * D] and [B, " + std::to_string(kv) + ", capacity, D]");
    }
    if (!isPacked) {
        const Shape keys{queries[0], queries[1], kv * caches[3]};
        const OrtValue* value = values.inputs[kVALUES];
        if (shapeOf(mApi, values.inputs[kKEYS]) != keys || value == nullptr ||
            shapeOf(mApi, value) != keys) {
            throw Fault("CachedAttention: keys and values have other shapes than " + textOf(keys));
        }
    }
    if (shapeOf(mApi, values.inputs[kLAST_POSITIONS]) != Shape{queries[0]}) {
        throw Fault("CachedAttention: last_positions needs one element for each of " +
                    std::to_string(queries[0]) + " sequences");
    }
    // The runtime's kernel would write behind the end: it takes longer texts for a cache to grow.
    const auto* total =
        static_cast<const std::int32_t*>(dataOf(mApi, values.inputs[kTOTAL_LENGTH]));
    if (*total > caches[2]) {
        throw Fault("CachedAttention: " + std::to_string(*total) +
                    " positions; allowed: up to the caches' " + std::to_string(caches[2]));
    }
}

void AttentionKernel::invoke(OrtKernelContext* context, const AttentionValues& values) const {
    check(mApi, mApi.InvokeOp(context, mOp, values.inputs.data(), static_cast<int>(kCOUNT),
                              values.outputs.data(), static_cast<int>(values.outputs.size())));
}

std::unique_ptr<Kernel> makeAttentionKernel(const OrtApi& api, const OrtKernelInfo* info,
                                            ElementType type) {
    return std::make_unique<AttentionKernel>(api, info, type);
}

FusedSpec cachedAttention(const char* provider, KernelFactory factory) {
    const FusedInput t{};
    const FusedInput maybe{InputType::kT, true};
    const FusedInput positions{InputType::kINT32, false};
    const FusedInput length{InputType::kINT32, false, /*isOnHost=*/true};
    return {"CachedAttention",
            {t, maybe, maybe, t, t, positions, length, maybe, maybe},
            3,
            provider,
            std::move(factory)};
}

}  // namespace nmexport
