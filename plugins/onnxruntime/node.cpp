#include "node.h"

namespace nmexport {

namespace {

std::string joined(const char* values) {
    std::string text;
    for (const char* c = values + 1; *c != '\0'; ++c) {
        text += *c == '|' ? (c[1] == '\0' ? "" : ", ") : std::string(1, *c);
    }
    return text;
}

}  // namespace

std::string textOf(const Shape& shape) {
    std::string text = "[";
    for (std::size_t i = 0; i < shape.size(); ++i) {
        text += (i > 0 ? ", " : "") + std::to_string(shape[i]);
    }
    return text + "]";
}

const AttributeSpec& Attributes::find(const char* name) const {
    for (std::size_t i = 0; i < mSpec.attributeCount; ++i) {
        if (std::string(mSpec.attributes[i].name) == name) return mSpec.attributes[i];
    }
    throw Fault(std::string(mSpec.name) + " has no attribute " + name);
}

void Attributes::fail(const AttributeSpec& attribute, const std::string& problem) const {
    const std::string allowed = attribute.isString
                                    ? "one of " + joined(attribute.values)
                                    : "an integer from " + std::to_string(attribute.minimum) +
                                          " to " + std::to_string(attribute.maximum);
    throw Fault(std::string(mSpec.name) + ": attribute " + attribute.name + " " + problem +
                "; allowed: " + allowed);
}

std::int64_t Attributes::integer(const char* name) const {
    const AttributeSpec& attribute = find(name);
    std::int64_t value = 0;
    if (!succeeded(mApi, mApi.KernelInfoGetAttribute_int64(mInfo, name, &value))) {
        float number = 0;
        std::size_t size = 0;
        char letter = 0;
        OrtStatus* status = mApi.KernelInfoGetAttribute_string(mInfo, name, &letter, &size);
        const bool isText = succeeded(mApi, status) || size > 0;
        if (isText || succeeded(mApi, mApi.KernelInfoGetAttribute_float(mInfo, name, &number))) {
            fail(attribute, "is of the wrong type");
        }
        if (!attribute.hasDefault) fail(attribute, "is missing");
        return attribute.defaultInt;
    }
    if (value < attribute.minimum || value > attribute.maximum) {
        fail(attribute, "is " + std::to_string(value));
    }
    return value;
}

std::string Attributes::text(const char* name) const {
    const AttributeSpec& attribute = find(name);
    std::size_t size = 0;
    // The first call fails and tells the size, terminator included; 0 where there is none.
    succeeded(mApi, mApi.KernelInfoGetAttribute_string(mInfo, name, nullptr, &size));
    if (size == 0) {
        std::int64_t number = 0;
        if (succeeded(mApi, mApi.KernelInfoGetAttribute_int64(mInfo, name, &number))) {
            fail(attribute, "is of the wrong type");
        }
        if (!attribute.hasDefault) fail(attribute, "is missing");
        return attribute.defaultString;
    }
    std::string value(size, '\0');
    check(mApi, mApi.KernelInfoGetAttribute_string(mInfo, name, value.data(), &size));
    value.resize(size - 1);
    if (value.find('|') != std::string::npos ||
        std::string(attribute.values).find("|" + value + "|") == std::string::npos) {
        fail(attribute, "is \"" + value + "\"");
    }
    return value;
}

Pattern Attributes::pattern() const {
    const Pattern pattern{static_cast<int>(integer("n")), static_cast<int>(integer("m"))};
    if (pattern.n > pattern.m) {
        throw Fault(std::string(mSpec.name) + ": n = " + std::to_string(pattern.n) +
                    " exceeds m = " + std::to_string(pattern.m) +
                    "; n of each m channels are kept");
    }
    return pattern;
}

InputShapes::InputShapes(const OrtApi& api, const OrtKernelInfo* info, const OpSpec& spec)
    : mApi(api), mConstant(spec.inputCount), mData(spec.inputCount, nullptr) {
    std::size_t count = 0;
    check(api, api.KernelInfo_GetInputCount(info, &count));
    for (std::size_t i = 0; i < spec.inputCount && i < count; ++i) {
        int isConstant = 0;
        const OrtValue* value = nullptr;
        OrtStatus* status = api.KernelInfoGetConstantInput_tensor(info, i, &isConstant, &value);
        if (!succeeded(api, status) || isConstant == 0 || value == nullptr) continue;
        mConstant[i] = shapeOf(api, value);
        mData[i] = dataOf(api, value);
    }
}

const Shape* InputShapes::constantShape(int input) const {
    const std::optional<Shape>& known = mConstant[static_cast<std::size_t>(input)];
    return known.has_value() ? &*known : nullptr;
}

Shape InputShapes::shape(int input, const OrtValue* value) const {
    const std::optional<Shape>& known = mConstant[static_cast<std::size_t>(input)];
    return known.has_value() ? *known : shapeOf(mApi, value);
}

Inputs::Inputs(const OrtApi& api, OrtKernelContext* context, const OpSpec& spec,
               const InputShapes& shapes)
    : mApi(api), mContext(context), mSpec(spec), mShapes(shapes) {
    check(api, api.KernelContext_GetInputCount(context, &mCount));
}

const OrtValue* Inputs::value(int input) const {
    const std::size_t index = static_cast<std::size_t>(input);
    if (index >= mCount) return nullptr;
    const OrtValue* value = nullptr;
    check(mApi, mApi.KernelContext_GetInput(mContext, index, &value));
    return value;
}

bool Inputs::has(int input) const {
    return value(input) != nullptr;
}

Shape Inputs::shape(int input) const {
    return mShapes.shape(input, value(input));
}

const void* Inputs::data(int input) const {
    const OrtValue* found = value(input);
    return found == nullptr ? nullptr : dataOf(mApi, found);
}

const void* Inputs::vector(int input, std::int64_t size, std::int64_t otherSize) const {
    const OrtValue* found = value(input);
    if (found == nullptr) return nullptr;
    const Shape given = mShapes.shape(input, found);
    if (given.size() != 1 || (given[0] != size && given[0] != otherSize)) {
        const std::string other = otherSize >= 0 ? " or [" + std::to_string(otherSize) + "]" : "";
        throw Fault(std::string(mSpec.name) + ": input " + mSpec.inputs[input].name +
                    " has shape " + textOf(given) + "; allowed: [" + std::to_string(size) + "]" +
                    other);
    }
    return dataOf(mApi, found);
}

void checkPermutation(const char* op, const std::int32_t* order, std::size_t channels) {
    std::vector<bool> seen(channels, false);
    for (std::size_t p = 0; p < channels; ++p) {
        const bool inside = order[p] >= 0 && static_cast<std::size_t>(order[p]) < channels;
        if (!inside || seen[static_cast<std::size_t>(order[p])]) {
            throw Fault(std::string(op) + ": channel_order[" + std::to_string(p) + "] = " +
                        std::to_string(order[p]) + (inside ? " occurs twice" : " is out of range") +
                        "; allowed: a permutation of 0 to " + std::to_string(channels - 1));
        }
        seen[static_cast<std::size_t>(order[p])] = true;
    }
}

ChannelOrder::ChannelOrder(const InputShapes& shapes, int input, const OpSpec& spec)
    : mInput(input), mSpec(spec), mChecked(shapes.constantData(input) != nullptr) {
    if (!mChecked || shapes.constantShape(input)->size() != 1) return;  // rank: see Inputs::vector
    checkPermutation(spec.name, static_cast<const std::int32_t*>(shapes.constantData(input)),
                     static_cast<std::size_t>(shapes.constantShape(input)->front()));
}

const std::int32_t* ChannelOrder::of(const Inputs& inputs, std::size_t channels) const {
    const auto* order = static_cast<const std::int32_t*>(
        inputs.vector(mInput, static_cast<std::int64_t>(channels)));
    if (order != nullptr && !mChecked) checkPermutation(mSpec.name, order, channels);
    return order;
}

Rows rowsOf(const char* op, const Shape& x, Pattern pattern) {
    if (x.empty()) throw Fault(std::string(op) + ": X is a scalar; allowed: [..., K]");
    if (x.back() < 1 || x.back() % pattern.m != 0) {
        throw Fault(std::string(op) + ": X has " + std::to_string(x.back()) +
                    " channels (its last axis); allowed: a positive multiple of m = " +
                    std::to_string(pattern.m));
    }
    Rows rows{1, static_cast<std::size_t>(x.back())};
    for (std::size_t i = 0; i + 1 < x.size(); ++i) rows.tokens *= static_cast<std::size_t>(x[i]);
    return rows;
}

void Pool::run(void* raw, std::size_t tasks, void (*task)(void*, std::size_t), void* state) {
    const Pool* pool = static_cast<const Pool*>(raw);
    check(pool->mApi, pool->mApi.KernelContext_ParallelFor(pool->mContext, task, tasks, 0, state));
}

ThreadPool Pool::threads() {
    return ThreadPool{Pool::run, this, mThreads};
}

void* outputData(const OrtApi& api, OrtKernelContext* context, const Shape& shape) {
    OrtValue* output = nullptr;
    check(api, api.KernelContext_GetOutput(context, 0, shape.data(), shape.size(), &output));
    return dataOf(api, output);
}

}  // namespace nmexport
