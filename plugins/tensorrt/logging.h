// Messages through TensorRT's own logger, and the fence that no exception crosses.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <exception>

namespace nmexport::trt {

// TensorRT says here where its logger is found; null forgets it.
void setLoggerFinder(nvinfer1::ILoggerFinder* finder) noexcept;

// Where messages go that no finder claims; null forgets it. For hosts that cannot make a finder.
using Sink = void (*)(std::int32_t severity, const char* message);
void setSink(Sink sink) noexcept;

// Through TensorRT's logger; to stderr where no logger has been made known. Never throws.
void log(nvinfer1::ILogger::Severity severity, const char* message) noexcept;

// "nmexport NMLinear "node": message" as an error.
void logError(const char* op, const char* node, const char* message) noexcept;

// body(), or `fallback` after the message of what it threw: the methods that TensorRT calls are
// noexcept, and an exception that left one would end the process. Plain text, since a string made
// from it for the call would allocate outside of the fence.
template <typename Result, typename Body>
Result guarded(const char* op, const char* node, Result fallback, const Body& body) noexcept {
    try {
        return body();
    } catch (const std::exception& error) {
        logError(op, node, error.what());
    } catch (...) {
        logError(op, node, "unknown failure");
    }
    return fallback;
}

}  // namespace nmexport::trt
