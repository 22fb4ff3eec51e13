#include "dense_product.h"

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "blaslt_api.h"
#include "cuda_fault.h"

namespace nmexport::cuda {

namespace {

using namespace blaslt;

// Shapes whose kernel is remembered: prompts of one serving process have many lengths.
constexpr std::size_t kREMEMBERED = 32;

// cuBLASLt's heuristic picks a slow kernel for a wide W and a few hundred tokens: [128, 4096] @
// [4096, 28672] takes 96 us on an H200, two halves of it 64 us. Few tokens and many are well
// served.
constexpr std::int64_t kWIDE = 16384;
constexpr std::int64_t kFEWEST_SPLIT = 17;
constexpr std::int64_t kMOST_SPLIT = 256;
constexpr std::int64_t kCOLUMN_UNIT = 64;  // a half begins where W is well aligned

// Into how many calls, side by side, the columns of W are cut.
std::int64_t piecesOf(const ProductShape& shape) {
    const bool isSplit = shape.outputs > kWIDE && shape.tokens >= kFEWEST_SPLIT &&
                         shape.tokens <= kMOST_SPLIT && shape.outputs % (2 * kCOLUMN_UNIT) == 0;
    return isSplit ? 2 : 1;
}

std::int64_t bytesOf(cudaDataType_t type) {
    return type == CUDA_R_32F ? 4 : 2;
}

void check(Status status, const char* what) {
    if (status != kSUCCESS) {
        throw Fault(std::string("cuBLASLt: ") + what + " failed with status " +
                    std::to_string(status));
    }
}

// Owns one of cuBLASLt's handles.
template <typename Raw>
class Owned {
  public:
    using Destroy = Status (*)(Raw);
    Owned() = default;
    Owned(Raw raw, Destroy destroy) : mRaw(raw), mDestroy(destroy) {}
    Owned(Owned&& other) noexcept { swap(other); }
    Owned& operator=(Owned&& other) noexcept {
        swap(other);
        return *this;
    }
    ~Owned() {
        if (mRaw != Raw{}) mDestroy(mRaw);
    }
    Raw get() const { return mRaw; }

  private:
    void swap(Owned& other) {
        std::swap(mRaw, other.mRaw);
        std::swap(mDestroy, other.mDestroy);
    }

    Raw mRaw{};
    Destroy mDestroy{nullptr};
};

cudaDataType_t dataType(DType type) {
    switch (type) {
        case DType::kFLOAT16:
            return CUDA_R_16F;
        case DType::kBFLOAT16:
            return CUDA_R_16BF;
        default:
            return CUDA_R_32F;
    }
}

// `stride`: elements from one column to the next.
Owned<Layout> layout(const Api& api, cudaDataType_t type, std::int64_t rows, std::int64_t columns,
                     std::int64_t stride) {
    Layout raw{};
    check(api.layoutCreate(&raw, type, static_cast<std::uint64_t>(rows),
                           static_cast<std::uint64_t>(columns), stride),
          "a matrix layout");
    return {raw, api.layoutDestroy};
}

// One shape's layouts and kernel. cuBLASLt counts by columns: row-major [K, O] is its O x K.
struct Plan {
    ProductShape shape;
    Owned<Layout> w;
    Owned<Layout> s;
    Owned<Layout> result;
    Algorithm algorithm{};
    std::int64_t pieces{1};
    std::int64_t weightStep{0};  // bytes from one piece's first column to the next's
    std::int64_t resultStep{0};

    Plan(const Api& api, Handle handle, Product product, const ProductShape& wanted)
        : shape(wanted) {
        const cudaDataType_t type = dataType(shape.type);
        const cudaDataType_t resultType = shape.floatResult ? CUDA_R_32F : type;
        pieces = piecesOf(shape);
        const std::int64_t columns = shape.outputs / pieces;
        weightStep = columns * bytesOf(type);
        resultStep = columns * bytesOf(resultType);
        w = layout(api, type, columns, shape.channels, shape.outputs);
        s = layout(api, type, shape.channels, shape.tokens, shape.channels);
        result = layout(api, resultType, columns, shape.tokens,
                        shape.resultStride == 0 ? shape.outputs : shape.resultStride);
        algorithm = bestAlgorithm(api, handle, product);
    }

    Algorithm bestAlgorithm(const Api& api, Handle handle, Product product) const {
        Preference raw{};
        check(api.preferenceCreate(&raw), "a preference");
        const Owned<Preference> preference(raw, api.preferenceDestroy);
        const std::size_t bytes = kPRODUCT_WORKSPACE_BYTES;
        check(api.preferenceSet(preference.get(), kMAX_WORKSPACE, &bytes, sizeof bytes),
              "the workspace limit");
        Heuristic best{};
        int found = 0;
        const Status status = api.heuristic(handle, product, w.get(), s.get(), result.get(),
                                            result.get(), preference.get(), 1, &best, &found);
        if (status != kSUCCESS || found < 1) {
            throw Fault("cuBLASLt has no kernel for [" + std::to_string(shape.tokens) + ", " +
                        std::to_string(shape.channels) + "] @ [" + std::to_string(shape.channels) +
                        ", " + std::to_string(shape.outputs) + "], status " +
                        std::to_string(status));
        }
        return best.algorithm;
    }
};

// One handle for all nodes of a device: it is safe to share, and a model has hundreds of nodes.
std::shared_ptr<Owned<Handle>> sharedHandle(const Api& api) {
    static std::mutex mutex;
    static std::map<int, std::weak_ptr<Owned<Handle>>> handles;
    int device = 0;
    if (cudaGetDevice(&device) != cudaSuccess) throw Fault("there is no current CUDA device");
    const std::lock_guard<std::mutex> lock(mutex);
    std::shared_ptr<Owned<Handle>> handle = handles[device].lock();
    if (handle == nullptr) {
        Handle raw{};
        check(api.create(&raw), "a handle");
        handle = std::make_shared<Owned<Handle>>(raw, api.destroy);
        handles[device] = handle;
    }
    return handle;
}

}  // namespace

struct DenseProduct::State {
    const Api& functions = api();
    std::shared_ptr<Owned<Handle>> handle;
    Owned<Product> product;
    std::vector<Plan> plans;
    std::size_t next{0};  // the plan that is forgotten first

    State() : handle(sharedHandle(functions)) {
        Product raw{};
        check(functions.productCreate(&raw, kCOMPUTE_32F, CUDA_R_32F), "a product");
        product = {raw, functions.productDestroy};
    }

    const Plan& planFor(const ProductShape& shape) {
        for (const Plan& plan : plans) {
            if (plan.shape == shape) return plan;
        }
        Plan plan(functions, handle->get(), product.get(), shape);
        if (plans.size() < kREMEMBERED) {
            plans.push_back(std::move(plan));
            return plans.back();
        }
        plans[next] = std::move(plan);
        const Plan& placed = plans[next];
        next = (next + 1) % kREMEMBERED;
        return placed;
    }
};

DenseProduct::DenseProduct() = default;
DenseProduct::~DenseProduct() = default;

void DenseProduct::prepare(const ProductShape& shape) {
    if (mState == nullptr) mState = std::make_unique<State>();
    mState->planFor(shape);
}

void DenseProduct::enqueue(const ProductShape& shape, const void* s, const void* w, void* result,
                           void* workspace, cudaStream_t stream) {
    prepare(shape);
    const Plan& plan = mState->planFor(shape);
    const float one = 1.0F;
    const float zero = 0.0F;
    for (std::int64_t piece = 0; piece < plan.pieces; ++piece) {
        const void* const columns = static_cast<const char*>(w) + piece * plan.weightStep;
        void* const to = static_cast<char*>(result) + piece * plan.resultStep;
        check(mState->functions.matmul(mState->handle->get(), mState->product.get(), &one, columns,
                                       plan.w.get(), s, plan.s.get(), &zero, to, plan.result.get(),
                                       to, plan.result.get(), &plan.algorithm, workspace,
                                       kPRODUCT_WORKSPACE_BYTES, stream),
              "the product");
    }
}

}  // namespace nmexport::cuda
