// The exports of the shared library.
#include <onnxruntime_c_api.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sched.h>
#endif

#include "cpu_kernels.h"
#include "fused_op.h"
#include "variant.h"

#define NMEXPORT_PUBLIC extern "C" __attribute__((visibility("default")))

namespace nmexport {
namespace {

using Ops = std::vector<CustomOp>;

constexpr ElementType kTYPES[] = {ElementType::kFLOAT32, ElementType::kFLOAT16,
                                  ElementType::kBFLOAT16};

Ops makeOps(const OrtApi* api, bool infersShapes, SessionSettings settings) {
    Ops ops;
    for (const ElementType type : kTYPES) {
        const auto prune = [settings](const OrtApi& of, const OrtKernelInfo* info,
                                      ElementType element) {
            return makePruneKernel({of, info}, element, settings);
        };
        ops.emplace_back(api, kNMPrune, type, prune, infersShapes);
    }
    for (const ElementType type : kTYPES) {
        for (const StoredTypes& stored : storedTypesFor(type)) {
            const auto linear = [settings, stored](const OrtApi& of, const OrtKernelInfo* info,
                                                   ElementType element) {
                return makeLinearKernel({of, info}, element, stored, settings);
            };
            ops.emplace_back(api, kNMLinear, type, stored, linear, infersShapes);
        }
    }
    return ops;
}

#if defined(NMEXPORT_HAS_CUDA)
// The same ops for sessions with the CUDA execution provider; other sessions never ask for them.
void addCudaOps(const OrtApi* api, bool infersShapes, Ops& ops) {
    for (const ElementType type : kTYPES) {
        ops.emplace_back(api, kNMPrune, type, makeCudaPruneKernel, infersShapes, kCUDA_PROVIDER);
        for (const StoredTypes& stored : storedTypesFor(type)) {
            if (!cudaTakes(type, stored)) continue;
            const auto linear = [stored](const OrtApi& of, const OrtKernelInfo* info,
                                         ElementType element) {
                return makeCudaLinearKernel(of, info, element, stored);
            };
            ops.emplace_back(api, kNMLinear, type, stored, linear, infersShapes, kCUDA_PROVIDER);
        }
    }
}
#endif

// The ops for one ONNX Runtime, of which a process may hold several, and sessions of such
// settings; they outlive every session. Shape inference is called back without an API, so the ops
// carry it. Null: to be described only.
const Ops& opsFor(const OrtApi* api, bool infersShapes, SessionSettings settings) {
    static std::mutex mutex;
    static std::map<std::pair<const OrtApi*, SessionSettings>, Ops> known;
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = known.find({api, settings});
    if (found != known.end()) return found->second;
    Ops ops = makeOps(api, infersShapes, settings);
#if defined(NMEXPORT_HAS_CUDA)
    if (api != nullptr) addCudaOps(api, infersShapes, ops);
#endif
    return known.emplace(std::pair{api, settings}, std::move(ops)).first->second;
}

std::size_t availableThreads() {
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) {
        return static_cast<std::size_t>(CPU_COUNT(&set));
    }
#endif
    const unsigned threads = std::thread::hardware_concurrency();
    return threads == 0 ? 1 : threads;
}

// A custom op is not told how many intra-op threads its session has, so whoever opens the session
// says so in this configuration entry; without it, as many as the process has processors.
constexpr const char* kTHREADS_ENTRY = "custom_op.nmexport.threads";
constexpr long kMOST_THREADS = 1024;
// 1: constant weights are copied into huge pages. Without it they stay where the session has them,
// in the mapped file as a rule, which processes share.
constexpr const char* kHUGE_PAGES_ENTRY = "custom_op.nmexport.huge_pages";

// An integer in the session's configuration, or `otherwise` where it says nothing.
long configured(const OrtApi& api, const OrtSessionOptions* options, const char* entry, long least,
                long most, long otherwise) {
    int isThere = 0;
    check(api, api.HasSessionConfigEntry(options, entry, &isThere));
    if (isThere == 0) return otherwise;
    char text[32] = {};
    std::size_t size = sizeof text;
    char* end = text;
    long value = 0;
    if (succeeded(api, api.GetSessionConfigEntry(options, entry, text, &size))) {
        value = std::strtol(text, &end, 10);
    }
    if (end == text || *end != '\0' || value < least || value > most) {
        throw Fault(std::string("session configuration entry ") + entry + " is \"" + text +
                    "\"; allowed: an integer from " + std::to_string(least) + " to " +
                    std::to_string(most));
    }
    return value;
}

SessionSettings settingsOf(const OrtApi& api, const OrtSessionOptions* options) {
    const long here = static_cast<long>(availableThreads());
    const long threads = configured(api, options, kTHREADS_ENTRY, 1, kMOST_THREADS, here);
    const bool hugePages = configured(api, options, kHUGE_PAGES_ENTRY, 0, 1, 0) == 1;
    return {static_cast<std::size_t>(threads), hugePages};
}

// ONNX Runtime up to 1.23 dereferences the missing type of an absent optional input before it
// asks a custom op for shapes, and crashes.
bool survivesShapeInference(const OrtApiBase& base) {
    int major = 0, minor = 0;
    if (std::sscanf(base.GetVersionString(), "%d.%d", &major, &minor) != 2) return false;
    return major > 1 || (major == 1 && minor >= 24);
}

std::string quoted(const char* text) {
    return std::string("\"") + text + "\"";
}

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
        text += (i > 0 ? ", " : "") + std::string("{\"name\": ") +
                quoted(op.spec().inputs[i].name) +
                ", \"type\": " + std::to_string(op.GetInputType(&op, i)) +
                ", \"optional\": " + (optional ? "true}" : "false}");
    }
    text +=
        "], \"output_type\": " + std::to_string(op.GetOutputType(&op, 0)) + ", \"attributes\": [";
    for (std::size_t i = 0; i < op.spec().attributeCount; ++i) {
        text += (i > 0 ? ", " : "") + described(op.spec().attributes[i]);
    }
    return text + "]}";
}

std::string describedLibrary() {
    std::string text = std::string("{\"version\": \"") + NMEXPORT_VERSION +
                       "\", \"ort_api_version\": " + std::to_string(ORT_API_VERSION) +
                       ", \"domain\": " + quoted(kDOMAIN) +
                       ", \"opset_version\": " + std::to_string(kOPSET_VERSION) +
                       ", \"cuda\": " + quoted(NMEXPORT_CUDA_ARCHITECTURES) + ", \"ops\": [";
    const Ops& ops = opsFor(nullptr, false, {1, false});
    for (std::size_t i = 0; i < ops.size(); ++i) {
        text += (i > 0 ? ", " : "") + described(ops[i]);
    }
    return text + "]}";
}

void registerOps(const OrtApi& api, bool infersShapes, OrtSessionOptions* options) {
    const SessionSettings settings = settingsOf(api, options);
    OrtCustomOpDomain* domain = nullptr;
    check(api, api.CreateCustomOpDomain(kDOMAIN, &domain));
    for (const CustomOp& op : opsFor(&api, infersShapes, settings))
        check(api, api.CustomOpDomain_Add(domain, &op));
    // The session options keep a reference; the domain itself lives as long as the library.
    check(api, api.AddCustomOpDomain(options, domain));
    OrtCustomOpDomain* fused = nullptr;
    check(api, api.CreateCustomOpDomain(kFUSED_DOMAIN, &fused));
    for (const FusedOp& op : cpuFusedOps(settings)) check(api, api.CustomOpDomain_Add(fused, &op));
#if defined(NMEXPORT_HAS_CUDA)
    for (const FusedOp& op : cudaFusedOps()) check(api, api.CustomOpDomain_Add(fused, &op));
#endif
    check(api, api.AddCustomOpDomain(options, fused));
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
    return nmexport::guarded(*api, [&] {
        nmexport::registerOps(*api, nmexport::survivesShapeInference(*base), options);
    });
}

// The library's version and the ops it registers, as JSON; valid as long as the library.
NMEXPORT_PUBLIC const char* nmexport_describe() {
    static const std::string text = nmexport::describedLibrary();
    return text.c_str();
}

// Name of the instruction-set variant in use: portable, avx2, avx512 or neon.
NMEXPORT_PUBLIC const char* nmexport_variant() {
    return nmexport::activeVariant().name;
}

// Uses another variant from now on; 0 where this processor cannot run it. Results do not change.
NMEXPORT_PUBLIC int nmexport_use_variant(const char* name) {
    return nmexport::useVariant(name) ? 1 : 0;
}

// Reads memory as fast as one thread reads it in order: the ceiling that measurements are held
// against. Returns the exclusive or of its words.
NMEXPORT_PUBLIC std::uint64_t nmexport_read(const void* data, std::size_t bytes) {
    return nmexport::activeVariant().readWords(data, bytes);
}
