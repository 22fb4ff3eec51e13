// As much of ONNX Runtime's C API as the ops call, on tensors that a test makes. No session, no
// GPU.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "ort_api.h"

namespace nmexport::test {

struct FakeTensor {
    Shape shape;
    std::vector<char> bytes;
    bool isConstant{false};
};

FakeTensor tensor(Shape shape, bool isConstant = true);

// A node of a graph; a null input is absent.
struct FakeNode {
    std::map<std::string, std::int64_t> attributes;
    std::vector<FakeTensor*> inputs;
    std::map<std::string, std::string> texts{};

    const OrtKernelInfo* info() const { return reinterpret_cast<const OrtKernelInfo*>(this); }
};

// One run of a node.
struct FakeRun {
    const FakeNode* node{nullptr};
    FakeTensor output;

    explicit FakeRun(const FakeNode& made) : node(&made) {}
    OrtKernelContext* context() { return reinterpret_cast<OrtKernelContext*>(this); }
};

// What happened to the session's device memory.
struct FakeMemory {
    int allocations{0};                   // by OrtAllocator::Alloc, which knows no stream
    std::vector<OrtKernelContext*> runs;  // that asked for scratch memory
    std::vector<void*> held;              // scratch memory that was not given back
    bool isSpent{false};                  // no scratch memory is left
};

FakeMemory& memory();
// Called with "scratch" and "free", in the order of these events.
using Note = void (*)(const char* event);
void noteMemory(Note note);

const OrtApi& fakeApi();

}  // namespace nmexport::test
