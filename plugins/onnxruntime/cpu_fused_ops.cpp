// The ops of domain nmexport.fused for the CPU provider, in float32.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <map>
#include <mutex>

#include "cpu_kernels.h"
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

template <typename T>
T* inputOf(const Run& run, std::size_t index) {
    return static_cast<T*>(run.data(index));
}

float* outputOf(const Run& run, std::size_t index, const Shape& shape) {
    return static_cast<float*>(run.output(index, shape));
}

// silu(gate) * up: the input is one value with both halves, or two values.
class GatedSiluKernel : public CpuKernel {
  public:
    GatedSiluKernel(const NodeInfo& node, std::size_t threads) : CpuKernel(node.api(), threads) {}

    void compute(const Run& run) const override {
        Shape shape = run.shape(0);
        const bool isPair = run.has(1);
        if (shape.empty() || (!isPair && shape.back() % 2 != 0)) {
            throw Fault("GatedSilu: X has shape " + textOf(shape) + "; allowed: [..., 2 * I]");
        }
        if (isPair && run.shape(1) != shape) {
            throw Fault("GatedSiluPair: gate has shape " + textOf(shape) + " and up " +
                        textOf(run.shape(1)) + "; allowed: one shape");
        }
        GatedSiluArguments arguments;
        arguments.stride = static_cast<std::size_t>(shape.back());
        if (!isPair) shape.back() /= 2;
        arguments.channels = static_cast<std::size_t>(shape.back());
        arguments.tokens = leading(shape, 1);
        arguments.gate = inputOf<float>(run, 0);
        arguments.up = isPair ? inputOf<float>(run, 1) : arguments.gate + arguments.channels;
        arguments.y = outputOf(run, 0, shape);
        gatedSilu(arguments, run.threads());
    }
};

// The norm of one value, or of the sum of two.
class NormKernel : public CpuKernel {
  public:
    NormKernel(const NodeInfo& node, std::size_t threads)
        : CpuKernel(node.api(), threads), mEpsilon(node.number("epsilon")) {}

    void compute(const Run& run) const override {
        const bool hasSkip = run.has(2);
        const Shape shape = run.shape(0);
        const Shape weight = run.shape(hasSkip ? 2 : 1);
        const bool fits = !shape.empty() && weight.size() == 1 && weight[0] == shape.back();
        if (!fits || (hasSkip && run.shape(1) != shape)) {
            throw Fault("Norm: X has shape " + textOf(shape) + " and weight " + textOf(weight) +
                        "; allowed: X and skip of one shape [..., K], weight [K]");
        }
        NormArguments arguments;
        arguments.channels = static_cast<std::size_t>(shape.back());
        arguments.tokens = leading(shape, 1);
        arguments.epsilon = mEpsilon;
        arguments.x = inputOf<float>(run, 0);
        arguments.skip = hasSkip ? inputOf<float>(run, 1) : nullptr;
        arguments.weight = inputOf<float>(run, hasSkip ? 2 : 1);
        arguments.y = outputOf(run, 0, shape);
        arguments.sum = hasSkip ? outputOf(run, 1, shape) : nullptr;
        residualNorm(arguments, run.threads());
    }

  private:
    float mEpsilon;
};

class LikeliestKernel : public CpuKernel {
  public:
    LikeliestKernel(const NodeInfo& node, std::size_t threads) : CpuKernel(node.api(), threads) {}

    void compute(const Run& run) const override {
        Shape shape = run.shape(0);
        if (shape.empty() || shape.back() < 1) {
            throw Fault("Likeliest: X has shape " + textOf(shape) +
                        "; allowed: [..., V], V an element at least");
        }
        const std::size_t columns = static_cast<std::size_t>(shape.back());
        const std::size_t rows = leading(shape, 1);
        const float* x = inputOf<float>(run, 0);
        shape.pop_back();
        std::int64_t* const ids = static_cast<std::int64_t*>(run.output(0, shape));
        for (std::size_t row = 0; row < rows; ++row, x += columns) {
            ids[row] = std::max_element(x, x + columns, isLess) - x;
        }
    }

  private:
    // NaN is larger than any number.
    static bool isLess(float a, float b) { return !std::isnan(a) && (a < b || std::isnan(b)); }
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
    PagedAttentionKernel(const NodeInfo& node, std::size_t threads)
        : CpuKernel(node.api(), threads),
          mHeads(integer(node, "num_heads")),
          mKvHeads(integer(node, "kv_num_heads")),
          mWindow(integer(node, "window")),
          mScale(node.number("scale")) {
        if (mHeads == 0 || mKvHeads == 0 || mHeads % mKvHeads != 0) {
            throw Fault("PagedAttention: " + std::to_string(mHeads) + " heads on " +
                        std::to_string(mKvHeads) + "; allowed: a positive multiple");
        }
    }

    void compute(const Run& run) const override {
        AttentionArguments arguments{};
        arguments.heads = mHeads;
        arguments.kvHeads = mKvHeads;
        arguments.scale = mScale;
        arguments.window = mWindow;
        setCaches(run, arguments);
        setTokens(run, arguments);
        setRotary(run, arguments);
        checkPlaces(arguments, run.shape(kPAGES), run.shape(kPAST_KEYS)[0]);
        Shape y = run.shape(kQUERIES);
        y.back() = static_cast<std::int64_t>(mHeads * arguments.headDim);
        arguments.y = outputOf(run, 0, y);
        pagedAttention(arguments, run.threads());
    }

  private:
    static std::size_t integer(const NodeInfo& node, const char* name) {
        const std::int64_t value = node.integer(name);
        if (value < 0) throw Fault(std::string("PagedAttention: ") + name + " is negative");
        return static_cast<std::size_t>(value);
    }

    void setCaches(const Run& run, AttentionArguments& a) const {
        const Shape keys = run.shape(kPAST_KEYS);
        const Shape values = run.shape(kPAST_VALUES);
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
        a.keys = inPlace(run, kPAST_KEYS, 1, keys);
        a.values = inPlace(run, kPAST_VALUES, 2, values);
    }

    // The output's memory, with the input's elements in it.
    static float* inPlace(const Run& run, std::size_t input, std::size_t output,
                          const Shape& shape) {
        const float* past = inputOf<float>(run, input);
        float* present = outputOf(run, output, shape);
        if (past != present) std::copy(past, past + leading(shape, 0), present);
        return present;
    }

    void setTokens(const Run& run, AttentionArguments& a) const {
        const Shape queries = run.shape(kQUERIES);
        a.tokens = leading(queries, 1);
        a.queries = inputOf<float>(run, kQUERIES);
        const std::size_t kept = mKvHeads * a.headDim;
        const std::size_t wide = mHeads * a.headDim;
        const bool isPacked = !run.has(kKEYS);
        const std::size_t width = isPacked ? wide + 2 * kept : wide;
        a.queryStride = width;
        a.keyStride = a.valueStride = isPacked ? width : kept;
        a.newKeys = isPacked ? a.queries + wide : inputOf<float>(run, kKEYS);
        a.newValues = isPacked ? a.newKeys + kept : inputOf<float>(run, kVALUES);
        const auto has = [&](std::size_t index, std::size_t size) {
            const Shape shape = run.shape(index);
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
            if (leading(run.shape(index), 0) != a.tokens) {
                throw Fault("PagedAttention: " + std::to_string(a.tokens) +
                            " tokens, and sequences or positions of another number");
            }
        }
        a.sequences = inputOf<std::int32_t>(run, kSEQUENCES);
        a.positions = inputOf<std::int32_t>(run, kPOSITIONS);
        a.pages = inputOf<std::int32_t>(run, kPAGES);
    }

    void setRotary(const Run& run, AttentionArguments& a) const {
        if (!run.has(kCOSINES)) return;
        const Shape shape = run.shape(kCOSINES);
        if (shape.size() != 2 || run.shape(kSINES) != shape ||
            2 * static_cast<std::size_t>(shape[1]) > a.headDim) {
            throw Fault("PagedAttention: cosines of shape " + textOf(shape) +
                        "; allowed: [positions, up to half of a head], as of the sines");
        }
        a.rotary = 2 * static_cast<std::size_t>(shape[1]);
        a.cosines = inputOf<float>(run, kCOSINES);
        a.sines = inputOf<float>(run, kSINES);
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
    float mScale;
};

template <typename K>
KernelFactory with(std::size_t threads) {
    return [threads](const OrtApi& api, const OrtKernelInfo* info, ElementType) {
        return std::make_unique<K>(NodeInfo(api, info), threads);
    };
}

std::vector<FusedOp> makeOps(const SessionSettings& settings) {
    const std::size_t threads = settings.threads;
    const FusedInput t{};
    const FusedInput maybe{InputType::kT, true};
    const FusedInput integer{InputType::kINT32, false};
    const KernelFactory region = [settings](const OrtApi& api, const OrtKernelInfo* info,
                                            ElementType) {
        return makeRegionKernel({api, info}, settings);
    };
    const std::vector<FusedSpec> specs = {
        {"GatedSilu", {t}, 1, nullptr, with<GatedSiluKernel>(threads)},
        {"GatedSiluPair", {t, t}, 1, nullptr, with<GatedSiluKernel>(threads)},
        {"ResidualNorm", {t, t, t}, 2, nullptr, with<NormKernel>(threads)},
        {"Norm", {t, t}, 1, nullptr, with<NormKernel>(threads)},
        {"PagedAttention",
         {t, maybe, maybe, integer, integer, integer, maybe, maybe, t, t},
         3,
         nullptr,
         with<PagedAttentionKernel>(threads)},
        cachedAttention(nullptr, makeAttentionKernel),
        {"Likeliest", {t}, 1, nullptr, with<LikeliestKernel>(threads), false, true},
        {"Region", {}, 1, nullptr, region, /*isVariadic=*/true}};
    std::vector<FusedOp> ops;
    for (const FusedSpec& spec : specs) ops.emplace_back(spec, ElementType::kFLOAT32);
    return ops;
}

// The types of W, its scales and its zero points, which are constants.
StoredTypes storedTypesOf(const NodeInfo& node) {
    const auto typeOf = [&](int input) {
        const OrtValue* value = node.constant(static_cast<std::size_t>(input));
        if (value == nullptr) return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
        OrtTensorTypeAndShapeInfo* info = nullptr;
        check(node.api(), node.api().GetTensorTypeAndShape(value, &info));
        ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
        OrtStatus* status = node.api().GetTensorElementType(info, &type);
        node.api().ReleaseTensorTypeAndShapeInfo(info);
        check(node.api(), status);
        return type;
    };
    return {typeOf(NMLinearInput::W), typeOf(NMLinearInput::weight_scale),
            typeOf(NMLinearInput::weight_zero_point)};
}

}  // namespace

std::unique_ptr<CpuKernel> makeCpuKernel(const std::string& op, const NodeInfo& node,
                                         const SessionSettings& settings) {
    if (op == "NMLinear") {
        return makeLinearKernel(node, ElementType::kFLOAT32, storedTypesOf(node), settings);
    }
    if (op == "PagedAttention") {
        return std::make_unique<PagedAttentionKernel>(node, settings.threads);
    }
    if (op == "Norm" || op == "ResidualNorm") {
        return std::make_unique<NormKernel>(node, settings.threads);
    }
    if (op == "GatedSilu" || op == "GatedSiluPair") {
        return std::make_unique<GatedSiluKernel>(node, settings.threads);
    }
    throw Fault("Region: a node is of op " + op +
                "; allowed: NMLinear, PagedAttention, Norm, ResidualNorm, GatedSilu, "
                "GatedSiluPair");
}

const std::vector<FusedOp>& cpuFusedOps(const SessionSettings& settings) {
    static std::mutex mutex;
    static std::map<SessionSettings, std::vector<FusedOp>> known;
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = known.find(settings);
    if (found != known.end()) return found->second;
    return known.emplace(settings, makeOps(settings)).first->second;
}

}  // namespace nmexport
