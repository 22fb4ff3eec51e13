#include "logging.h"

#include <dlfcn.h>

#include <atomic>
#include <cstdio>
#include <string>

namespace nmexport::trt {

namespace {

std::atomic<nvinfer1::ILoggerFinder*>& loggerFinder() {
    static std::atomic<nvinfer1::ILoggerFinder*> finder{nullptr};
    return finder;
}

std::atomic<Sink>& hostSink() {
    static std::atomic<Sink> sink{nullptr};
    return sink;
}

// The logger of whichever TensorRT is in this process, where it has one of its own.
nvinfer1::ILogger* loggerOfProcess() {
    using GetLogger = nvinfer1::ILogger* (*)();
    for (const char* name : {"libtensorrt_rtx.so.1", "libnvinfer.so.11", "libnvinfer.so.10",
                             "libnvinfer_lean.so.11", "libnvinfer_lean.so.10"}) {
        void* library = dlopen(name, RTLD_LAZY | RTLD_NOLOAD);
        if (library == nullptr) continue;
        const auto getLogger = reinterpret_cast<GetLogger>(dlsym(library, "getLogger"));
        nvinfer1::ILogger* logger = getLogger == nullptr ? nullptr : getLogger();
        dlclose(library);  // only the reference taken here
        if (logger != nullptr) return logger;
    }
    return nullptr;
}

}  // namespace

void setLoggerFinder(nvinfer1::ILoggerFinder* finder) noexcept {
    loggerFinder().store(finder);
}

void setSink(Sink sink) noexcept {
    hostSink().store(sink);
}

void log(nvinfer1::ILogger::Severity severity, const char* message) noexcept {
    try {
        // A finder may know of no logger, as where a plugin is made outside of any builder.
        nvinfer1::ILoggerFinder* finder = loggerFinder().load();
        nvinfer1::ILogger* logger = finder == nullptr ? nullptr : finder->findLogger();
        const Sink sink = hostSink().load();
        if (logger == nullptr && sink != nullptr) {
            sink(static_cast<std::int32_t>(severity), message);
            return;
        }
        if (logger == nullptr) logger = loggerOfProcess();
        if (logger != nullptr) {
            logger->log(severity, message);
            return;
        }
    } catch (...) {
        // findLogger is not noexcept; stderr remains.
    }
    std::fprintf(stderr, "%s\n", message);
}

void logError(const char* op, const char* node, const char* message) noexcept {
    try {
        const std::string text = std::string("nmexport ") + op + " \"" + node + "\": " + message;
        log(nvinfer1::ILogger::Severity::kERROR, text.c_str());
    } catch (...) {  // out of memory: the message alone needs none
        log(nvinfer1::ILogger::Severity::kERROR, message);
    }
}

}  // namespace nmexport::trt
