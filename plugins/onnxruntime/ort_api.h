// The C API of ONNX Runtime, as far as the ops need it, with faults as C++ exceptions inside the
// library and as OrtStatus at its border.
#pragma once

#include <onnxruntime_c_api.h>

#include <cstdint>
#include <exception>
#include <new>
#include <string>
#include <utility>
#include <vector>

namespace nmexport {

// A message for the user of the model.
class Fault : public std::exception {
  public:
    explicit Fault(std::string message) : mMessage(std::move(message)) {}
    const char* what() const noexcept override { return mMessage.c_str(); }

  private:
    std::string mMessage;
};

using Shape = std::vector<std::int64_t>;

inline void check(const OrtApi& api, OrtStatus* status) {
    if (status == nullptr) return;
    std::string message = api.GetErrorMessage(status);
    api.ReleaseStatus(status);
    throw Fault(std::move(message));
}

// True where the call succeeded; the reason it did not is dropped.
inline bool succeeded(const OrtApi& api, OrtStatus* status) {
    if (status == nullptr) return true;
    api.ReleaseStatus(status);
    return false;
}

// Runs a body and turns whatever it throws into a status: no exception crosses the C border.
template <typename Body>
OrtStatus* guarded(const OrtApi& api, const Body& body) noexcept {
    try {
        body();
        return nullptr;
    } catch (const std::bad_alloc&) {
        return api.CreateStatus(ORT_FAIL, "nmexport: out of memory");
    } catch (const std::exception& error) {
        return api.CreateStatus(ORT_INVALID_ARGUMENT, error.what());
    } catch (...) {
        return api.CreateStatus(ORT_FAIL, "nmexport: unknown error");
    }
}

inline Shape shapeOf(const OrtApi& api, const OrtValue* value) {
    OrtTensorTypeAndShapeInfo* info = nullptr;
    check(api, api.GetTensorTypeAndShape(value, &info));
    std::size_t rank = 0;
    OrtStatus* status = api.GetDimensionsCount(info, &rank);
    Shape shape(rank);
    if (status == nullptr) status = api.GetDimensions(info, shape.data(), rank);
    api.ReleaseTensorTypeAndShapeInfo(info);
    check(api, status);
    return shape;
}

inline void* dataOf(const OrtApi& api, const OrtValue* value) {
    void* data = nullptr;
    check(api, api.GetTensorMutableData(const_cast<OrtValue*>(value), &data));
    return data;
}

}  // namespace nmexport
