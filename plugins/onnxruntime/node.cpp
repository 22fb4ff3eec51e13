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
    const OrtApi& api = mNode.api();
    const OrtKernelInfo* info = mNode.raw();
    const std::string key = mNode.nameOf(name);
    std::int64_t value = 0;
    if (!succeeded(api, api.KernelInfoGetAttribute_int64(info, key.c_str(), &value))) {
        float number = 0;
        std::size_t size = 0;
        char letter = 0;
        OrtStatus* status = api.KernelInfoGetAttribute_string(info, key.c_str(), &letter, &size);
        const bool isText = succeeded(api, status) || size > 0;
        if (isText ||
            succeeded(api, api.KernelInfoGetAttribute_float(info, key.c_str(), &number))) {
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
    const OrtApi& api = mNode.api();
    const OrtKernelInfo* info = mNode.raw();
    const std::string key = mNode.nameOf(name);
    std::size_t size = 0;
    // The first call fails and tells the size, terminator included; 0 where there is none.
    succeeded(api, api.KernelInfoGetAttribute_string(info, key.c_str(), nullptr, &size));
    if (size == 0) {
        std::int64_t number = 0;
        if (succeeded(api, api.KernelInfoGetAttribute_int64(info, key.c_str(), &number))) {
            fail(attribute, "is of the wrong type");
        }
        if (!attribute.hasDefault) fail(attribute, "is missing");
        return attribute.defaultString;
    }
    std::string value(size, '\0');
    check(api, api.KernelInfoGetAttribute_string(info, key.c_str(), value.data(), &size));
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

InputShapes::InputShapes(const NodeInfo& node, const OpSpec& spec)
    : mConstant(spec.inputCount), mData(spec.inputCount, nullptr) {
    const std::size_t count = node.inputCount();
    for (std::size_t i = 0; i < spec.inputCount && i < count; ++i) {
        const OrtValue* value = node.constant(i);
        if (value == nullptr) continue;
        mConstant[i] = shapeOf(node.api(), value);
        mData[i] = dataOf(node.api(), value);
    }
}

const Shape* InputShapes::constantShape(int input) const {
    const std::optional<Shape>& known = mConstant[static_cast<std::size_t>(input)];
    return known.has_value() ? &*known : nullptr;
}

Shape Inputs::shape(int input) const {
    const Shape* known = mShapes.constantShape(input);
    return known != nullptr ? *known : mRun.shape(static_cast<std::size_t>(input));
}

const void* Inputs::vector(int input, std::int64_t size, std::int64_t otherSize) const {
    if (!has(input)) return nullptr;
    const Shape given = shape(input);
    if (given.size() != 1 || (given[0] != size && given[0] != otherSize)) {
        const std::string other = otherSize >= 0 ? " or [" + std::to_string(otherSize) + "]" : "";
        throw Fault(std::string(mSpec.name) + ": input " + mSpec.inputs[input].name +
                    " has shape " + textOf(given) + "; allowed: [" + std::to_string(size) + "]" +
                    other);
    }
    return data(input);
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

}  // namespace nmexport
