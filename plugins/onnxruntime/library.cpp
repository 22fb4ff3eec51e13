// What the shared library exports.
#include <onnxruntime_c_api.h>

#include <array>
#include <string>

#include "custom_op.h"
#include "variant.h"

#define NMEXPORT_PUBLIC extern "C" __attribute__((visibility("default")))

namespace nmexport {
namespace {

// Outlives every session that the process opens.
const std::array<CustomOp, 6>& customOps() {
    static const std::array<CustomOp, 6> ops{{
        {kNMPrune, ElementType::kFLOAT32, makePruneKernel},
        {kNMPrune, ElementType::kFLOAT16, makePruneKernel},
        {kNMPrune, ElementType::kBFLOAT16, makePruneKernel},
        {kNMLinear, ElementType::kFLOAT32, makeLinearKernel},
        {kNMLinear, ElementType::kFLOAT16, makeLinearKernel},
        {kNMLinear, ElementType::kBFLOAT16, makeLinearKernel},
    }};
    return ops;
}

std::string quoted(const char* text) { return std::string("\"") + text + "\""; }

std::string described(const AttributeSpec& attribute) {
    std::string text = "{\"name\": " + quoted(attribute.name) + ", \"type\": ";
    if (attribute.isString) {
        text += "\"string\", \"values\": " + quoted(attribute.values);
        if (attribute.hasDefault) text += ", \"default\": " + quoted(attribute.defaultString);
    } else {
        text += "\"int\", \"min\": " + std::to_string(attribute.minimum) +
                ", \"max\": " + std::to_string(attribute.maximum);
        if (attribute.hasDefault) text += ", \"default\": " + std::to_string(attribute.defaultInt);
    }
    return text + "}";
}

// As ONNX Runtime is told: input types are numbers of ONNXTensorElementDataType.
std::string described(const CustomOp& op) {
    std::string text = "{\"name\": " + quoted(op.GetName(&op)) + ", \"inputs\": [";
    for (std::size_t i = 0; i < op.GetInputTypeCount(&op); ++i) {
        const bool optional = op.GetInputCharacteristic(&op, i) == INPUT_OUTPUT_OPTIONAL;
        text += (i > 0 ? ", " : "") + std::string("{\"name\": ") + quoted(op.spec().inputs[i].name) +
                ", \"type\": " + std::to_string(op.GetInputType(&op, i)) +
                ", \"optional\": " + (optional ? "true}" : "false}");
    }
    text += "], \"output_type\": " + std::to_string(op.GetOutputType(&op, 0)) + ", \"attributes\": [";
    for (std::size_t i = 0; i < op.spec().attributeCount; ++i) {
        text += (i > 0 ? ", " : "") + described(op.spec().attributes[i]);
    }
    return text + "]}";
}

std::string describedLibrary() {
    std::string text = std::string("{\"version\": \"") + NMEXPORT_VERSION +
                       "\", \"ort_api_version\": " + std::to_string(ORT_API_VERSION) +
                       ", \"domain\": " + quoted(kDOMAIN) +
                       ", \"opset_version\": " + std::to_string(kOPSET_VERSION) + ", \"ops\": [";
    for (std::size_t i = 0; i < customOps().size(); ++i) {
        text += (i > 0 ? ", " : "") + described(customOps()[i]);
    }
    return text + "]}";
}

void registerOps(const OrtApi& api, OrtSessionOptions* options) {
    OrtCustomOpDomain* domain = nullptr;
    check(api, api.CreateCustomOpDomain(kDOMAIN, &domain));
    for (const CustomOp& op : customOps()) check(api, api.CustomOpDomain_Add(domain, &op));
    // The session options keep a reference; the domain itself lives as long as the library.
    check(api, api.AddCustomOpDomain(options, domain));
}

}  // namespace
}  // namespace nmexport

// The entry that `SessionOptions.register_custom_ops_library` looks for.
NMEXPORT_PUBLIC OrtStatus* ORT_API_CALL RegisterCustomOps(OrtSessionOptions* options,
                                                          const OrtApiBase* base) {
    const OrtApi* api = base->GetApi(ORT_API_VERSION);
    if (api == nullptr) {
        return base->GetApi(1)->CreateStatus(
            ORT_NOT_IMPLEMENTED,
            "nmexport: this ONNX Runtime is older than the headers the library was built on; "
            "upgrade onnxruntime");
    }
    return nmexport::guarded(*api, [&] { nmexport::registerOps(*api, options); });
}

// The library's version and the ops it registers, as JSON; valid as long as the library.
NMEXPORT_PUBLIC const char* nmexport_describe() {
    static const std::string text = nmexport::describedLibrary();
    return text.c_str();
}

// Name of the instruction-set variant in use: portable, avx2, avx512 or neon.
NMEXPORT_PUBLIC const char* nmexport_variant() { return nmexport::activeVariant().name; }

// Uses another variant from now on; 0 where this processor cannot run it. Results do not change.
NMEXPORT_PUBLIC int nmexport_use_variant(const char* name) {
    return nmexport::useVariant(name) ? 1 : 0;
}
