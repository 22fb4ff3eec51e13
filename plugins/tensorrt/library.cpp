// Entry points of the plugin library. TensorRT looks for getCreators and setLoggerFinder by name.
#include <NvInferVersion.h>
#include <cuda_runtime_api.h>

#include <string>

#include "creators.h"
#include "logging.h"

#define NMEXPORT_PUBLIC extern "C" __attribute__((visibility("default")))

namespace {

using nmexport::trt::NmPluginCreator;

std::string description() {
    return std::string("{\"version\": \"") + NMEXPORT_VERSION + "\", \"tensorrt_headers\": \"" +
           std::to_string(NV_TENSORRT_MAJOR) + "." + std::to_string(NV_TENSORRT_MINOR) +
           "\", \"cuda\": " + std::to_string(CUDART_VERSION) + ", \"architectures\": \"" +
           NMEXPORT_CUDA_ARCHITECTURES + "\", \"plugin_version\": \"" + nmexport::kPLUGIN_VERSION +
           "\"}";
}

}  // namespace

// The creators live as long as the library.
NMEXPORT_PUBLIC nvinfer1::IPluginCreatorInterface* const* getCreators(std::int32_t& count) {
    static NmPluginCreator prune(nmexport::kNMPrune);
    static NmPluginCreator linear(nmexport::kNMLinear);
    static nvinfer1::IPluginCreatorInterface* const creators[] = {&prune, &linear};
    count = 2;
    return creators;
}

NMEXPORT_PUBLIC void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
    nmexport::trt::setLoggerFinder(finder);
}

// For hosts without C++, such as Python: where messages go as long as TensorRT gives no finder.
NMEXPORT_PUBLIC void nmexport_log_to(nmexport::trt::Sink sink) {
    nmexport::trt::setSink(sink);
}

// Versions the library was built with, as JSON; valid as long as the library.
NMEXPORT_PUBLIC const char* nmexport_describe_plugin() {
    static const std::string text = description();
    return text.c_str();
}
