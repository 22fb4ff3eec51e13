// The ops of domain nmexport.fused for the CPU provider, in float32.
#include <algorithm>
#include <map>
#include <mutex>

#include "fused_op.h"
#include "node.h"
#include "step.h"

namespace nmexport {

namespace {

// The product of all axes but the last `kept`.
std::size_t leading(const Shape& shape, std::size_t kept) {
    std::size_t product = 1;
    for (std::size_t i = 0; i + kept < shape.size(); ++i) {
        product *= static_cast<std::size_t>(shape[i]);
    }
    return product;
}

// The inputs of one run, by index.
class Given {
  public:
    Given(const OrtApi& api, OrtKernelContext* context) : mApi(api), mContext(context) {
        check(api, api.KernelContext_GetInputCount(context, &mCount));
    }

    const OrtValue* value(std::size_t index) const {
        const OrtValue* found = nullptr;
        if (index < mCount) check(mApi, mApi.KernelContext_GetInput(mContext, index, &found));
        return found;
    }
    Shape shape(std::size_t index) const { return shapeOf(mApi, value(index)); }
    // Null where the input is absent.
    template <typename T>
    T* data(std::size_t index) const {
        const OrtValue* found = value(index);
        return found == nullptr ? nullptr : static_cast<T*>(dataOf(mApi, found));
    }
    template <typename T>
    T* output(std::size_t index, const Shape& shape) const {
        OrtValue* made = nullptr;
        check(mApi,
              mApi.KernelContext_GetOutput(mContext, index, shape.data(), shape.size(), &made));
        return static_cast<T*>(dataOf(mApi, made));
    }

  private:
    const OrtApi& mApi;
    OrtKernelContext* mContext;
    std::size_t mCount = 0;
};

class CpuKernel : public Kernel {
  public:
    CpuKernel(const OrtApi& api, std::size_t threads) : mApi(api), mThreads(threads) {}

  protected:
    const OrtApi& mApi;
    std::size_t mThreads;
};

// Of one value with both halves, or of two values.
class GatedSiluKernel : public CpuKernel {
  public:
    GatedSiluKernel(const OrtApi& api, const OrtKernelInfo*, std::size_t threads)
        : CpuKernel(api, threads) {}

    void run(OrtKernelContext* context) const override {
        const Given given(mApi, context);
        Shape shape = given.shape(0);
        const bool isPair = given.value(1) != nullptr;
        if (shape.empty() || (!isPair && shape.back() % 2 != 0)) {
            throw Fault("GatedSilu: X has shape " + textOf(shape) + "; allowed: [..., 2 * I]");
        }
        if (isPair && given.shape(1) != shape) {
            throw Fault("GatedSiluPair: gate has shape " + textOf(shape) + " and up " +
                        textOf(given.shape(1)) + "; allowed: one shape");
        }
        GatedSiluArguments arguments;
        arguments.stride = static_cast<std::size_t>(shape.back());
        if (!isPair) shape.back() /= 2;
        arguments.channels = static_cast<std::size_t>(shape.back());
        arguments.tokens = leading(shape, 1);
        arguments.gate = given.data<float>(0);
        arguments.up = isPair ? given.data<float>(1) : arguments.gate + arguments.channels;
        arguments.y = given.output<float>(0, shape);
        Pool pool(mApi, context, mThreads);
        gatedSilu(arguments, pool.threads());
    }
};

// Of one value, or of the sum of two.
class NormKernel : public CpuKernel {
  public:
    NormKernel(const OrtApi& api, const OrtKernelInfo* info, std::size_t threads)
        : CpuKernel(api, threads) {
        check(api, api.KernelInfoGetAttribute_float(info, "epsilon", &mEpsilon));
    }

    void run(OrtKernelContext* context) const override {
        const Given given(mApi, context);
        const bool hasSkip = given.value(2) != nullptr;
        const Shape shape = given.shape(0);
        const Shape weight = given.shape(hasSkip ? 2 : 1);
        const bool fits = !shape.empty() && weight.size() == 1 && weight[0] == shape.back();
        if (!fits || (hasSkip && given.shape(1) != shape)) {
            throw Fault("Norm: X has shape " + textOf(shape) + " and weight " + textOf(weight) +
                        "; allowed: X and skip of one shape [..., K], weight [K]");
        }
        NormArguments arguments;
        arguments.channels = static_cast<std::size_t>(shape.back());
        arguments.tokens = leading(shape, 1);
        arguments.epsilon = mEpsilon;
        arguments.x = given.data<float>(0);
        arguments.skip = hasSkip ? given.data<float>(1) : nullptr;
        arguments.weight = given.data<float>(hasSkip ? 2 : 1);
        arguments.y = given.output<float>(0, shape);
        arguments.sum = hasSkip ? given.output<float>(1, shape) : nullptr;
        Pool pool(mApi, context, mThreads);
        residualNorm(arguments, pool.threads());
    }

  private:
    float mEpsilon = 0.0f;
};

enum AttentionInput : std::size_t {
    kQUERIES,
    kKEYS,
    kVALUES,
    kSEQUENCES,
    kPOSITIONS,
    kPAGES,
    kCOSINES,
    kSINES,
    kPAST_KEYS,
    kPAST_VALUES
};

class PagedAttentionKernel : public CpuKernel {
  public:
    PagedAttentionKernel(const OrtApi& api, const OrtKernelInfo* info, std::size_t threads)
        : CpuKernel(api, threads),
          mHeads(integer(info, "num_heads")),
          mKvHeads(integer(info, "kv_num_heads")),
          mWindow(integer(info, "window")) {
        check(api, api.KernelInfoGetAttribute_float(info, "scale", &mScale));
        if (mHeads == 0 || mKvHeads == 0 || mHeads % mKvHeads != 0) {
            throw Fault("PagedAttention: " + std::to_string(mHeads) + " heads on " +
                        std::to_string(mKvHeads) + "; allowed: a positive multiple");
        }
    }

    void run(OrtKernelContext* context) const override {
        const Given given(mApi, context);
        AttentionArguments arguments{};
        arguments.heads = mHeads;
        arguments.kvHeads = mKvHeads;
        arguments.scale = mScale;
        arguments.window = mWindow;
        setCaches(given, arguments);
        setTokens(given, arguments);
        setRotary(given, arguments);
        checkPlaces(arguments, given.shape(kPAGES), given.shape(kPAST_KEYS)[0]);
        Shape y = given.shape(kQUERIES);
        y.back() = static_cast<std::int64_t>(mHeads * arguments.headDim);
        arguments.y = given.output<float>(0, y);
        Pool pool(mApi, context, mThreads);
        pagedAttention(arguments, pool.threads());
    }

  private:
    std::size_t integer(const OrtKernelInfo* info, const char* name) const {
        std::int64_t value = 0;
        check(mApi, mApi.KernelInfoGetAttribute_int64(info, name, &value));
        if (value < 0) throw Fault(std::string("PagedAttention: ") + name + " is negative");
        return static_cast<std::size_t>(value);
    }

    void setCaches(const Given& given, AttentionArguments& a) const {
        const Shape keys = given.shape(kPAST_KEYS);
        const Shape values = given.shape(kPAST_VALUES);
        const std::int64_t page = static_cast<std::int64_t>(kPAGE);
        const bool fits = keys.size() == 4 && values.size() == 4 && keys[0] == values[0] &&
                          keys[1] == static_cast<std::int64_t>(mKvHeads) && keys[1] == values[1] &&
                          keys[2] == values[3] && keys[3] == page && values[2] == page;
        if (!fits) {
            throw Fault("PagedAttention: caches of shapes " + textOf(keys) + " and " +
                        textOf(values) + "; allowed: [pages, heads, D, " + std::to_string(page) +
                        "] and [pages, heads, " + std::to_string(page) + ", D]");
        }
        a.headDim = static_cast<std::size_t>(keys[2]);
        a.keys = inPlace(given, kPAST_KEYS, 1, keys);
        a.values = inPlace(given, kPAST_VALUES, 2, values);
    }

    // The output's memory, with the input's elements in it.
    static float* inPlace(const Given& given, std::size_t input, std::size_t output,
                          const Shape& shape) {
        const float* past = given.data<float>(input);
        float* present = given.output<float>(output, shape);
        if (past != present) std::copy(past, past + leading(shape, 0), present);
        return present;
    }

    void setTokens(const Given& given, AttentionArguments& a) const {
        const Shape queries = given.shape(kQUERIES);
        a.tokens = leading(queries, 1);
        a.queries = given.data<float>(kQUERIES);
        const std::size_t kept = mKvHeads * a.headDim;
        const std::size_t wide = mHeads * a.headDim;
        const bool isPacked = given.value(kKEYS) == nullptr;
        const std::size_t width = isPacked ? wide + 2 * kept : wide;
        a.queryStride = width;
        a.keyStride = a.valueStride = isPacked ? width : kept;
        a.newKeys = isPacked ? a.queries + wide : given.data<float>(kKEYS);
        a.newValues = isPacked ? a.newKeys + kept : given.data<float>(kVALUES);
        const auto has = [&](std::size_t index, std::size_t size) {
            const Shape shape = given.shape(index);
            return !shape.empty() && leading(shape, 1) == a.tokens &&
                   static_cast<std::size_t>(shape.back()) == size;
        };
        if (!has(kQUERIES, width) || (!isPacked && (!has(kKEYS, kept) || !has(kVALUES, kept)))) {
            throw Fault("PagedAttention: queries have shape " + textOf(queries) +
                        "; allowed: [..., T, " + std::to_string(wide) +
                        "] next to keys and values"
                        " [..., T, " +
                        std::to_string(kept) + "], or rows of all three");
        }
        for (const std::size_t index : {kSEQUENCES, kPOSITIONS}) {
            if (leading(given.shape(index), 0) != a.tokens) {
                throw Fault("PagedAttention: " + std::to_string(a.tokens) +
                            " tokens, and sequences or positions of another number");
            }
        }
        a.sequences = given.data<std::int32_t>(kSEQUENCES);
        a.positions = given.data<std::int32_t>(kPOSITIONS);
        a.pages = given.data<std::int32_t>(kPAGES);
    }

    void setRotary(const Given& given, AttentionArguments& a) const {
        if (given.value(kCOSINES) == nullptr) return;
        const Shape shape = given.shape(kCOSINES);
        if (shape.size() != 2 || given.shape(kSINES) != shape ||
            2 * static_cast<std::size_t>(shape[1]) > a.headDim) {
            throw Fault("PagedAttention: cosines of shape " + textOf(shape) +
                        "; allowed: [positions, up to half of a head], as of the sines");
        }
        a.rotary = 2 * static_cast<std::size_t>(shape[1]);
        a.cosines = given.data<float>(kCOSINES);
        a.sines = given.data<float>(kSINES);
        for (std::size_t t = 0; t < a.tokens; ++t) {
            if (a.positions[t] >= shape[0]) {
                throw Fault("PagedAttention: position " + std::to_string(a.positions[t]) +
                            "; allowed: below " + std::to_string(shape[0]));
            }
        }
    }

    static void checkPlaces(AttentionArguments& a, const Shape& pages, std::int64_t count) {
        if (pages.size() != 2) throw Fault("PagedAttention: pages have shape " + textOf(pages));
        a.pageStride = static_cast<std::size_t>(pages[1]);
        for (std::size_t t = 0; t < a.tokens; ++t) {
            const std::int64_t row = a.sequences[t];
            const std::int64_t page = a.positions[t] / static_cast<std::int64_t>(kPAGE);
            const bool inside =
                row >= 0 && row < pages[0] && a.positions[t] >= 0 && page < pages[1];
            if (!inside) {
                throw Fault("PagedAttention: token " + std::to_string(t) + " of sequence " +
                            std::to_string(row) + " and position " +
                            std::to_string(a.positions[t]) + " is outside of pages " +
                            textOf(pages));
            }
            const bool follows = t > 0 && a.sequences[t - 1] == row;
            if (follows && a.positions[t] != a.positions[t - 1] + 1) {
                throw Fault("PagedAttention: tokens of a sequence must follow each other");
            }
            for (std::int64_t p = 0; p <= page && !follows; ++p) checkPage(a, row, p, count);
            if (follows) checkPage(a, row, page, count);
        }
    }

    static void checkPage(const AttentionArguments& a, std::int64_t row, std::int64_t place,
                          std::int64_t count) {
        const std::int32_t page =
            a.pages[static_cast<std::size_t>(row) * a.pageStride + static_cast<std::size_t>(place)];
        if (page < 0 || page >= count) {
            throw Fault("PagedAttention: page " + std::to_string(page) + "; allowed: 0 to " +
                        std::to_string(count - 1));
        }
    }

    std::size_t mHeads;
    std::size_t mKvHeads;
    std::size_t mWindow;
    float mScale = 0.0f;
};

template <typename K>
KernelFactory with(std::size_t threads) {
    return [threads](const OrtApi& api, const OrtKernelInfo* info, ElementType) {
        return std::make_unique<K>(api, info, threads);
    };
}

std::vector<FusedOp> makeOps(std::size_t threads) {
    const FusedInput t{};
    const FusedInput maybe{InputType::kT, true};
    const FusedInput integer{InputType::kINT32, false};
    const std::vector<FusedSpec> specs = {
        {"GatedSilu", {t}, 1, nullptr, with<GatedSiluKernel>(threads)},
        {"GatedSiluPair", {t, t}, 1, nullptr, with<GatedSiluKernel>(threads)},
        {"ResidualNorm", {t, t, t}, 2, nullptr, with<NormKernel>(threads)},
        {"Norm", {t, t}, 1, nullptr, with<NormKernel>(threads)},
        {"PagedAttention",
         {t, maybe, maybe, integer, integer, integer, maybe, maybe, t, t},
         3,
         nullptr,
         with<PagedAttentionKernel>(threads)}};
    std::vector<FusedOp> ops;
    for (const FusedSpec& spec : specs) ops.emplace_back(spec, ElementType::kFLOAT32);
    return ops;
}

}  // namespace

const std::vector<FusedOp>& cpuFusedOps(std::size_t threads) {
    static std::mutex mutex;
    static std::map<std::size_t, std::vector<FusedOp>> known;
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = known.find(threads);
    if (found != known.end()) return found->second;
    return known.emplace(threads, makeOps(threads)).first->second;
}

}  // namespace nmexport
