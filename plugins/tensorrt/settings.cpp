#include "settings.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <optional>

#include "fault.h"

namespace nmexport::trt {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;

namespace {

const char* typeName(PluginFieldType type) {
    switch (type) {
        case PluginFieldType::kINT32:
            return "int32";
        case PluginFieldType::kINT64:
            return "int64";
        case PluginFieldType::kFLOAT32:
            return "float32";
        case PluginFieldType::kCHAR:
            return "text";
        default:
            return "another type";
    }
}

// "|all|prefill|decode|" as "all, prefill, decode".
std::string listed(const char* values) {
    std::string text;
    for (const char* c = values + 1; *c != '\0'; ++c) {
        text += *c == '|' ? (c[1] == '\0' ? "" : ", ") : std::string(1, *c);
    }
    return text;
}

std::string allowedBy(const AttributeSpec& attribute) {
    if (attribute.isString) return "one of " + listed(attribute.values);
    return "an integer from " + std::to_string(attribute.minimum) + " to " +
           std::to_string(attribute.maximum);
}

[[noreturn]] void fail(const AttributeSpec& attribute, const std::string& problem) {
    throw Fault(std::string("field ") + attribute.name + " " + problem +
                "; allowed: " + allowedBy(attribute));
}

class FieldReader {
  public:
    FieldReader(const OpSpec& spec, const PluginFieldCollection* fields) : mSpec(spec) {
        if (fields == nullptr || (fields->nbFields > 0 && fields->fields == nullptr)) {
            throw Fault("no fields were given; allowed: " + names());
        }
        mFields.assign(fields->fields, fields->fields + std::max(fields->nbFields, 0));
        for (const PluginField& field : mFields) {
            if (field.name == nullptr) throw Fault("a field has no name; allowed: " + names());
        }
    }

    const PluginField* find(const char* name) const {
        const auto found = std::find_if(
            mFields.begin(), mFields.end(),
            [&](const PluginField& field) { return std::strcmp(field.name, name) == 0; });
        return found == mFields.end() || found->data == nullptr ? nullptr : &*found;
    }

    void refuseUnknown() const {
        for (const PluginField& field : mFields) {
            const bool known =
                std::any_of(mSpec.attributes, mSpec.attributes + mSpec.attributeCount,
                            [&](const AttributeSpec& attribute) {
                                return std::strcmp(attribute.name, field.name) == 0;
                            });
            if (!known && std::strcmp(field.name, kINPUTS_FIELD) != 0) {
                throw Fault(std::string("field ") + field.name +
                            " is not known; allowed: " + names());
            }
        }
    }

    // The attribute's default where the op does not have it, or the node does not give it.
    std::int64_t integer(const char* name) const {
        const AttributeSpec* attribute = attributeNamed(name);
        if (attribute == nullptr) return 0;
        const std::optional<std::int64_t> value = integerOf(*attribute, find(name));
        if (!value.has_value()) return attribute->defaultInt;
        if (*value < attribute->minimum || *value > attribute->maximum) {
            fail(*attribute, "is " + std::to_string(*value));
        }
        return *value;
    }

    std::string text(const char* name) const {
        const AttributeSpec* attribute = attributeNamed(name);
        if (attribute == nullptr) return "";
        const PluginField* field = find(name);
        if (field == nullptr) {
            if (!attribute->hasDefault) fail(*attribute, "is missing");
            return attribute->defaultString;
        }
        if (field->type != PluginFieldType::kCHAR) {
            fail(*attribute, std::string("is ") + typeName(field->type));
        }
        const std::string value = textOf(*field);
        const bool listedThere =
            value.find('|') == std::string::npos &&
            std::string(attribute->values).find("|" + value + "|") != std::string::npos;
        if (!listedThere) fail(*attribute, "is \"" + value + "\"");
        return value;
    }

    // Text as a parser hands it over, with or without a terminator.
    static std::string textOf(const PluginField& field) {
        const char* begin = static_cast<const char*>(field.data);
        return std::string(
            begin,
            strnlen(begin, static_cast<std::size_t>(std::max(field.length, std::int32_t{0}))));
    }

    static std::optional<std::int64_t> valueOf(const PluginField& field) {
        if (field.length != 1) return std::nullopt;
        if (field.type == PluginFieldType::kINT32) {
            std::int32_t value = 0;
            std::memcpy(&value, field.data, sizeof value);
            return value;
        }
        if (field.type == PluginFieldType::kINT64) {
            std::int64_t value = 0;
            std::memcpy(&value, field.data, sizeof value);
            return value;
        }
        return std::nullopt;
    }

  private:
    static std::optional<std::int64_t> integerOf(const AttributeSpec& attribute,
                                                 const PluginField* field) {
        if (field == nullptr) {
            if (!attribute.hasDefault) fail(attribute, "is missing");
            return std::nullopt;
        }
        const std::optional<std::int64_t> value = valueOf(*field);
        if (!value.has_value()) {
            fail(attribute, std::string("is ") + typeName(field->type) + " of length " +
                                std::to_string(field->length));
        }
        return value;
    }

    const AttributeSpec* attributeNamed(const char* name) const {
        const AttributeSpec* end = mSpec.attributes + mSpec.attributeCount;
        const AttributeSpec* found = std::find_if(
            mSpec.attributes, end,
            [&](const AttributeSpec& attribute) { return std::strcmp(attribute.name, name) == 0; });
        return found == end ? nullptr : found;
    }

    std::string names() const {
        std::string text;
        for (std::size_t i = 0; i < mSpec.attributeCount; ++i) {
            text += std::string(mSpec.attributes[i].name) + ", ";
        }
        return text + kINPUTS_FIELD;
    }

    const OpSpec& mSpec;
    std::vector<PluginField> mFields;
};

Phase phaseOf(const std::string& name) {
    if (name == "prefill") return Phase::kPREFILL;
    return name == "decode" ? Phase::kDECODE : Phase::kALL;
}

std::string inputNames(const OpSpec& spec) {
    std::vector<int> all(spec.inputCount);
    std::iota(all.begin(), all.end(), 0);
    return trt::inputNames(spec, all);
}

// "X,W,bias" as positions in the contract.
std::vector<int> inputsNamed(const OpSpec& spec, const std::string& text) {
    std::vector<int> inputs;
    for (std::size_t start = 0; start <= text.size();) {
        const std::size_t end = std::min(text.find(',', start), text.size());
        const std::string name = text.substr(start, end - start);
        const InputSpec* found =
            std::find_if(spec.inputs, spec.inputs + spec.inputCount,
                         [&](const InputSpec& input) { return name == input.name; });
        const int position = static_cast<int>(found - spec.inputs);
        const bool isLater = inputs.empty() || position > inputs.back();
        if (found == spec.inputs + spec.inputCount || !isLater) {
            throw Fault(std::string("field ") + kINPUTS_FIELD + " is \"" + text + "\", where \"" +
                        name + "\" does not belong; allowed: names of " + inputNames(spec) +
                        " in this order, parted by commas");
        }
        inputs.push_back(position);
        start = end + 1;
    }
    return inputs;
}

Settings read(const FieldReader& reader, const OpSpec& spec, const char* node) {
    Settings settings;
    settings.spec = &spec;
    settings.node = node == nullptr ? "" : node;
    settings.n = static_cast<std::int32_t>(reader.integer("n"));
    settings.m = static_cast<std::int32_t>(reader.integer("m"));
    if (settings.n > settings.m) {
        throw Fault("field n is " + std::to_string(settings.n) + " and field m is " +
                    std::to_string(settings.m) + "; allowed: n from 1 to m");
    }
    settings.dynamicShift = reader.integer("dynamic_shift") != 0;
    settings.varianceCorrection = reader.integer("variance_correction") != 0;
    settings.phase = phaseOf(reader.text("phase"));
    if (reader.integer("activation_bits") != 0) {
        throw Fault("field activation_bits is 8; allowed on a GPU: 0, as an operand stays float");
    }
    if (const PluginField* field = reader.find(kINPUTS_FIELD)) {
        if (field->type != PluginFieldType::kCHAR) {
            throw Fault(std::string("field ") + kINPUTS_FIELD + " is " + typeName(field->type) +
                        "; allowed: text");
        }
        settings.inputs = inputsNamed(spec, FieldReader::textOf(*field));
    }
    return settings;
}

}  // namespace

std::string inputNames(const OpSpec& spec, const std::vector<int>& inputs) {
    std::string text;
    for (const int input : inputs) {
        text += (text.empty() ? "" : ",") + std::string(spec.inputs[input].name);
    }
    return text;
}

const char* nameOf(Phase phase) {
    if (phase == Phase::kPREFILL) return "prefill";
    return phase == Phase::kDECODE ? "decode" : "all";
}

int Settings::tensorOf(int input) const {
    const auto found = std::find(inputs.begin(), inputs.end(), input);
    return found == inputs.end() ? -1 : static_cast<int>(found - inputs.begin());
}

bool Settings::sparsifies(std::int64_t sequence) const {
    if (phase == Phase::kALL) return true;
    return (phase == Phase::kDECODE) == (sequence == 1);
}

std::string Settings::signature() const {
    std::string text = std::string(spec->name) + ";" + std::to_string(n) + ":" + std::to_string(m) +
                       ";" + (dynamicShift ? "d" : "") + (varianceCorrection ? "v" : "") + ";" +
                       nameOf(phase) + ";";
    for (const int input : inputs) text += std::to_string(input) + ",";
    return text + ";" + NMEXPORT_VERSION;
}

Settings settingsFromNode(const OpSpec& spec, const char* node,
                          const PluginFieldCollection* fields) {
    const FieldReader reader(spec, fields);
    reader.refuseUnknown();
    return read(reader, spec, node);
}

Settings settingsFromPlan(const OpSpec& spec, const char* node,
                          const PluginFieldCollection* fields) {
    const FieldReader reader(spec, fields);
    const PluginField* schema = reader.find(kSCHEMA_FIELD);
    const std::optional<std::int64_t> value =
        schema == nullptr ? std::nullopt : FieldReader::valueOf(*schema);
    if (!value.has_value() || *value != kPLAN_SCHEMA) {
        const PluginField* version = reader.find(kVERSION_FIELD);
        const bool isText = version != nullptr && version->type == PluginFieldType::kCHAR;
        throw Fault("the plan was written by plugin library " +
                    (isText ? FieldReader::textOf(*version) : std::string("of unknown version")) +
                    ", field " + kSCHEMA_FIELD + " is " +
                    (value.has_value() ? std::to_string(*value) : std::string("missing")) +
                    "; allowed: " + std::to_string(kPLAN_SCHEMA) + " (this is library " +
                    NMEXPORT_VERSION + "): build the engine again");
    }
    return read(reader, spec, node);
}

const PluginFieldCollection* PlanFields::write(const Settings& settings) {
    mSettings = settings;
    mDynamicShift = settings.dynamicShift ? 1 : 0;
    mVarianceCorrection = settings.varianceCorrection ? 1 : 0;
    mPhase = nameOf(settings.phase);
    mVersion = NMEXPORT_VERSION;
    mInputs = inputNames(*settings.spec, settings.inputs);
    mFields.clear();
    addInteger("n", mSettings.n);
    addInteger("m", mSettings.m);
    if (settings.spec == &kNMLinear) {
        addInteger("dynamic_shift", mDynamicShift);
        addInteger("variance_correction", mVarianceCorrection);
        addText("phase", mPhase);
    }
    if (!mInputs.empty()) addText(kINPUTS_FIELD, mInputs);
    addInteger(kSCHEMA_FIELD, mSchema);
    addText(kVERSION_FIELD, mVersion);
    mCollection = {static_cast<std::int32_t>(mFields.size()), mFields.data()};
    return &mCollection;
}

void PlanFields::addInteger(const char* name, const std::int32_t& value) {
    mFields.emplace_back(name, &value, PluginFieldType::kINT32, 1);
}

void PlanFields::addText(const char* name, const std::string& value) {
    mFields.emplace_back(name, value.data(), PluginFieldType::kCHAR,
                         static_cast<std::int32_t>(value.size()));
}

}  // namespace nmexport::trt
