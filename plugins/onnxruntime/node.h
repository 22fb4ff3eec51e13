// One node of a graph: its attributes read once, its inputs checked against the contract.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "contract.h"
#include "element.h"
#include "ort_api.h"
#include "selection.h"
#include "thread_pool.h"

namespace nmexport {

// Reads attributes as the contract describes them.
class Attributes {
  public:
    Attributes(const OrtApi& api, const OrtKernelInfo* info, const OpSpec& spec)
        : mApi(api), mInfo(info), mSpec(spec) {}

    // Throws Fault where the attribute is missing, of another type, or out of range.
    std::int64_t integer(const char* name) const;
    std::string text(const char* name) const;
    // n and m, with n <= m.
    Pattern pattern() const;

  private:
    const AttributeSpec& find(const char* name) const;
    [[noreturn]] void fail(const AttributeSpec& attribute, const std::string& problem) const;

    const OrtApi& mApi;
    const OrtKernelInfo* mInfo;
    const OpSpec& mSpec;
};

// What is known of a node's inputs before it runs.
class InputShapes {
  public:
    InputShapes(const OrtApi& api, const OrtKernelInfo* info, const OpSpec& spec);

    // Of one run; reads the shape only where it was not known before.
    Shape shape(int input, const OrtValue* value) const;
    // Of a constant input; null where it is absent or not constant.
    const Shape* constantShape(int input) const;
    const void* constantData(int input) const { return mData[static_cast<std::size_t>(input)]; }

  private:
    const OrtApi& mApi;
    std::vector<std::optional<Shape>> mConstant;
    std::vector<const void*> mData;
};

// The inputs of one run.
class Inputs {
  public:
    Inputs(const OrtApi& api, OrtKernelContext* context, const OpSpec& spec,
           const InputShapes& shapes);

    bool has(int input) const;
    Shape shape(int input) const;
    // Null where the input is absent.
    const void* data(int input) const;
    // The same, of an input that must have one of the given sizes and rank 1.
    const void* vector(int input, std::int64_t size, std::int64_t otherSize = -1) const;

  private:
    const OrtValue* value(int input) const;

    const OrtApi& mApi;
    OrtKernelContext* mContext;
    const OpSpec& mSpec;
    const InputShapes& mShapes;
    std::size_t mCount = 0;
};

// Throws Fault unless `order` [channels], on the host, is a permutation.
void checkPermutation(const char* op, const std::int32_t* order, std::size_t channels);

// The input channel_order: checked once where it is constant, at every run where it is not.
class ChannelOrder {
  public:
    // Throws Fault where a constant order is no permutation.
    ChannelOrder(const InputShapes& shapes, int input, const OpSpec& spec);
    // Null where the input is absent; throws Fault where it is no permutation of the channels.
    const std::int32_t* of(const Inputs& inputs, std::size_t channels) const;

  private:
    int mInput;
    const OpSpec& mSpec;
    bool mChecked;
};

// X's channels and tokens; throws Fault unless the last axis can be cut into groups.
struct Rows {
    std::size_t tokens;
    std::size_t channels;
};
Rows rowsOf(const char* op, const Shape& x, Pattern pattern);

std::string textOf(const Shape& shape);

// ONNX Runtime's own intra-op threads, for the time of one run.
class Pool {
  public:
    // `threads` only set how finely work is cut, never a result.
    Pool(const OrtApi& api, OrtKernelContext* context, std::size_t threads)
        : mApi(api), mContext(context), mThreads(threads) {}
    // Valid as long as this object.
    ThreadPool threads();

  private:
    static void run(void* raw, std::size_t tasks, void (*task)(void*, std::size_t), void* state);

    const OrtApi& mApi;
    OrtKernelContext* mContext;
    std::size_t mThreads;
};

// Allocates the output and returns its data.
void* outputData(const OrtApi& api, OrtKernelContext* context, const Shape& shape);

}  // namespace nmexport
