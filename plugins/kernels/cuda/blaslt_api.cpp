#include "blaslt_api.h"

#include <dlfcn.h>

#include <mutex>
#include <optional>
#include <string>

#include "cuda_fault.h"

namespace nmexport::cuda::blaslt {

namespace {

constexpr const char* kLIBRARIES[] = {"libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"};

void* openLibrary() {
    // One that the process has loaded already, from whatever folder, comes first.
    for (const char* name : kLIBRARIES) {
        if (void* library = dlopen(name, RTLD_NOW | RTLD_LOCAL | RTLD_NOLOAD)) return library;
    }
    for (const char* name : kLIBRARIES) {
        if (void* library = dlopen(name, RTLD_NOW | RTLD_LOCAL)) return library;
    }
    return nullptr;
}

template <typename Function>
void find(void* library, const char* name, Function& function) {
    function = reinterpret_cast<Function>(dlsym(library, name));
    if (function == nullptr) throw Fault(std::string("libcublasLt has no function ") + name);
}

Api load() {
    void* library = openLibrary();
    if (library == nullptr) {
        throw Fault(
            "cuBLASLt, which multiplies prompts and batches of more than one or two tokens, is not "
            "found: libcublasLt.so.13 or libcublasLt.so.12 must be on the library path "
            "(pip install nvidia-cublas, or CUDA's own)");
    }
    Api api{};
    find(library, "cublasLtCreate", api.create);
    find(library, "cublasLtDestroy", api.destroy);
    find(library, "cublasLtMatmulDescCreate", api.productCreate);
    find(library, "cublasLtMatmulDescDestroy", api.productDestroy);
    find(library, "cublasLtMatmulDescSetAttribute", api.productSet);
    find(library, "cublasLtMatrixLayoutCreate", api.layoutCreate);
    find(library, "cublasLtMatrixLayoutDestroy", api.layoutDestroy);
    find(library, "cublasLtMatmulPreferenceCreate", api.preferenceCreate);
    find(library, "cublasLtMatmulPreferenceSetAttribute", api.preferenceSet);
    find(library, "cublasLtMatmulPreferenceDestroy", api.preferenceDestroy);
    find(library, "cublasLtMatmulAlgoGetHeuristic", api.heuristic);
    find(library, "cublasLtMatmul", api.matmul);
    return api;  // the library stays loaded: its handles may outlive any plugin
}

}  // namespace

const Api& api() {
    static std::mutex mutex;
    static std::optional<Api> loaded;
    const std::lock_guard<std::mutex> lock(mutex);
    if (!loaded.has_value()) loaded = load();
    return *loaded;
}

}  // namespace nmexport::cuda::blaslt
