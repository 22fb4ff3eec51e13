// A kernel's arguments: what the runtime knows of its node, and the tensors of one run. A node
// stands in the graph itself, or is one of a Region's, which is a single node to the runtime.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "ort_api.h"
#include "thread_pool.h"

namespace nmexport {

// A node before it runs.
class NodeInfo {
  public:
    // A node of the graph.
    NodeInfo(const OrtApi& api, const OrtKernelInfo* info) : mApi(&api), mInfo(info) {}
    // A node of a region: the region has its attributes, under names with a prefix, and its inputs:
    // inputs[i] is the region's input that is this node's i-th, or -1 where it is none.
    NodeInfo(const NodeInfo& region, std::string prefix, std::vector<std::int64_t> inputs)
        : mApi(region.mApi),
          mInfo(region.mInfo),
          mPrefix(std::move(prefix)),
          mInputs(std::move(inputs)),
          mIsInside(true) {}

    const OrtApi& api() const { return *mApi; }
    // The handle that the C API reads attributes from, and an attribute's full name.
    const OrtKernelInfo* raw() const { return mInfo; }
    std::string nameOf(const char* attribute) const { return mPrefix + attribute; }

    std::size_t inputCount() const;
    // Null where the input is absent or not constant.
    const OrtValue* constant(std::size_t input) const;
    // Throw Fault where there is no such attribute, or one of another type.
    float number(const char* attribute) const;
    std::int64_t integer(const char* attribute) const;
    std::vector<std::int64_t> integers(const char* attribute) const;
    std::string text(const char* attribute) const;

  private:
    const OrtApi* mApi;
    const OrtKernelInfo* mInfo;
    std::string mPrefix;
    std::vector<std::int64_t> mInputs;
    bool mIsInside = false;
};

// One run of a node.
class Run {
  public:
    virtual ~Run() = default;
    virtual bool has(std::size_t input) const = 0;
    // Only for an input that is there.
    virtual Shape shape(std::size_t input) const = 0;
    // Null where the input is absent.
    virtual void* data(std::size_t input) const = 0;
    // Makes an output and returns its memory.
    virtual void* output(std::size_t index, const Shape& shape) const = 0;
    // Valid as long as this object.
    virtual ThreadPool threads() const = 0;
};

// A run of a node of the graph, on ONNX Runtime's own intra-op threads.
class OrtRun : public Run {
  public:
    // `threads` only set how finely work is cut, never a result.
    OrtRun(const OrtApi& api, OrtKernelContext* context, std::size_t threads = 1);

    bool has(std::size_t input) const override { return value(input) != nullptr; }
    Shape shape(std::size_t input) const override { return shapeOf(mApi, value(input)); }
    void* data(std::size_t input) const override;
    void* output(std::size_t index, const Shape& shape) const override;
    ThreadPool threads() const override;

  private:
    const OrtValue* value(std::size_t input) const;

    const OrtApi& mApi;
    OrtKernelContext* mContext;
    std::size_t mThreads;
    std::size_t mCount = 0;
};

}  // namespace nmexport
