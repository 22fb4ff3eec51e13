// The shape of the op contract as data; contract.h, generated from contract.json, holds its values.
#pragma once

#include <cstddef>
#include <cstdint>

namespace nmexport {

enum class InputType { kT, kW, kFLOAT32, kINT32 };  // kW: that of the input W

struct InputSpec {
    const char* name;
    InputType type;
    bool optional;
};

struct AttributeSpec {
    const char* name;
    bool isString;
    bool hasDefault;
    std::int64_t minimum;
    std::int64_t maximum;
    std::int64_t defaultInt;
    const char* defaultString;
    const char* values;  // allowed strings, each between bars: |all|prefill|decode|
};

struct OpSpec {
    const char* name;
    const InputSpec* inputs;
    std::size_t inputCount;
    const AttributeSpec* attributes;
    std::size_t attributeCount;
};

}  // namespace nmexport
