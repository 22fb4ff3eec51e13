#include "fake_runtime.h"

#include <algorithm>
#include <cstring>
#include <numeric>

namespace nmexport::test {

namespace {

Note gNote = nullptr;

const FakeTensor* tensorOf(const OrtValue* value) {
    return reinterpret_cast<const FakeTensor*>(value);
}

const FakeNode& nodeOf(const OrtKernelInfo* info) {
    return *reinterpret_cast<const FakeNode*>(info);
}

OrtStatus* fault(const char* message) {
    return reinterpret_cast<OrtStatus*>(new std::string(message));
}

// The device's arena.
struct FakeAllocator : OrtAllocator {
    FakeAllocator() : OrtAllocator{} {
        version = ORT_API_VERSION;
        Alloc = [](OrtAllocator*, std::size_t size) -> void* {
            ++memory().allocations;
            return new char[size];
        };
        Free = [](OrtAllocator*, void* data) {
            std::vector<void*>& held = memory().held;
            held.erase(std::remove(held.begin(), held.end(), data), held.end());
            gNote("free");
            delete[] static_cast<char*>(data);
        };
        Info = [](const OrtAllocator* allocator) {
            return reinterpret_cast<const OrtMemoryInfo*>(allocator);
        };
    }
};

FakeAllocator& allocator() {
    static FakeAllocator one;
    return one;
}

void addStatus(OrtApi& api) {
    api.GetErrorMessage = [](const OrtStatus* status) noexcept {
        return reinterpret_cast<const std::string*>(status)->c_str();
    };
    api.ReleaseStatus = [](OrtStatus* status) noexcept {
        delete reinterpret_cast<std::string*>(status);
    };
}

void addTensors(OrtApi& api) {
    api.GetTensorTypeAndShape = [](const OrtValue* value,
                                   OrtTensorTypeAndShapeInfo** info) noexcept -> OrtStatus* {
        *info = reinterpret_cast<OrtTensorTypeAndShapeInfo*>(const_cast<OrtValue*>(value));
        return nullptr;
    };
    api.GetDimensionsCount = [](const OrtTensorTypeAndShapeInfo* info,
                                std::size_t* count) noexcept -> OrtStatus* {
        *count = reinterpret_cast<const FakeTensor*>(info)->shape.size();
        return nullptr;
    };
    api.GetDimensions = [](const OrtTensorTypeAndShapeInfo* info, std::int64_t* sizes,
                           std::size_t) noexcept -> OrtStatus* {
        const Shape& shape = reinterpret_cast<const FakeTensor*>(info)->shape;
        std::copy(shape.begin(), shape.end(), sizes);
        return nullptr;
    };
    api.ReleaseTensorTypeAndShapeInfo = [](OrtTensorTypeAndShapeInfo*) noexcept {};
    api.GetTensorMutableData = [](OrtValue* value, void** data) noexcept -> OrtStatus* {
        *data = const_cast<char*>(tensorOf(value)->bytes.data());
        return nullptr;
    };
}

void addKernelInfo(OrtApi& api) {
    api.KernelInfo_GetInputCount = [](const OrtKernelInfo* info,
                                      std::size_t* count) noexcept -> OrtStatus* {
        *count = nodeOf(info).inputs.size();
        return nullptr;
    };
    api.KernelInfoGetConstantInput_tensor = [](const OrtKernelInfo* info, std::size_t index,
                                               int* isConstant,
                                               const OrtValue** value) noexcept -> OrtStatus* {
        const FakeTensor* found = nodeOf(info).inputs[index];
        *isConstant = found != nullptr && found->isConstant ? 1 : 0;
        *value = *isConstant != 0 ? reinterpret_cast<const OrtValue*>(found) : nullptr;
        return nullptr;
    };
    api.KernelInfoGetAttribute_int64 = [](const OrtKernelInfo* info, const char* name,
                                          std::int64_t* value) noexcept -> OrtStatus* {
        const auto found = nodeOf(info).attributes.find(name);
        if (found == nodeOf(info).attributes.end()) return fault("no such attribute");
        *value = found->second;
        return nullptr;
    };
    api.KernelInfoGetAttribute_string = [](const OrtKernelInfo* info, const char* name, char* out,
                                           std::size_t* size) noexcept -> OrtStatus* {
        const std::map<std::string, std::string>& texts = nodeOf(info).texts;
        const auto found = texts.find(name);
        if (found == texts.end()) return fault("no such attribute");
        const std::size_t room = out == nullptr ? 0 : *size;
        *size = found->second.size() + 1;  // what ends it is counted
        if (room >= *size) std::memcpy(out, found->second.c_str(), *size);
        return out == nullptr || room >= *size ? nullptr : fault("too little room");
    };
    api.KernelInfoGetAttribute_float = [](const OrtKernelInfo*, const char*,
                                          float*) noexcept -> OrtStatus* {
        return fault("no such attribute");
    };
    api.KernelInfoGetAllocator = [](const OrtKernelInfo*, OrtMemType,
                                    OrtAllocator** out) noexcept -> OrtStatus* {
        *out = &allocator();
        return nullptr;
    };
    api.ReleaseAllocator = [](OrtAllocator*) noexcept {};
}

void addKernelContext(OrtApi& api) {
    api.KernelContext_GetInputCount = [](const OrtKernelContext* context,
                                         std::size_t* count) noexcept -> OrtStatus* {
        *count = reinterpret_cast<const FakeRun*>(context)->node->inputs.size();
        return nullptr;
    };
    api.KernelContext_GetInput = [](const OrtKernelContext* context, std::size_t index,
                                    const OrtValue** value) noexcept -> OrtStatus* {
        const FakeRun* run = reinterpret_cast<const FakeRun*>(context);
        *value = reinterpret_cast<const OrtValue*>(run->node->inputs[index]);
        return nullptr;
    };
    api.KernelContext_GetOutput = [](OrtKernelContext* context, std::size_t,
                                     const std::int64_t* sizes, std::size_t count,
                                     OrtValue** value) noexcept -> OrtStatus* {
        FakeRun* run = reinterpret_cast<FakeRun*>(context);
        run->output = tensor(Shape(sizes, sizes + count));
        *value = reinterpret_cast<OrtValue*>(&run->output);
        return nullptr;
    };
    api.KernelContext_GetGPUComputeStream = [](const OrtKernelContext*,
                                               void** stream) noexcept -> OrtStatus* {
        *stream = nullptr;
        return nullptr;
    };
    api.KernelContext_GetScratchBuffer = [](const OrtKernelContext* context,
                                            const OrtMemoryInfo* where, std::size_t bytes,
                                            void** out) noexcept -> OrtStatus* {
        if (memory().isSpent) return fault("no memory left");
        if (where != allocator().Info(&allocator())) return fault("memory of another device");
        *out = new char[bytes];
        memory().runs.push_back(const_cast<OrtKernelContext*>(context));
        memory().held.push_back(*out);
        gNote("scratch");
        return nullptr;
    };
}

}  // namespace

FakeTensor tensor(Shape shape, bool isConstant) {
    const std::int64_t count =
        std::accumulate(shape.begin(), shape.end(), std::int64_t{1}, std::multiplies<>());
    return {std::move(shape), std::vector<char>(static_cast<std::size_t>(count) * 4), isConstant};
}

FakeMemory& memory() {
    static FakeMemory one;
    return one;
}

void noteMemory(Note note) {
    gNote = note;
}

const OrtApi& fakeApi() {
    static const OrtApi api = [] {
        OrtApi made{};
        addStatus(made);
        addTensors(made);
        addKernelInfo(made);
        addKernelContext(made);
        return made;
    }();
    return api;
}

}  // namespace nmexport::test
