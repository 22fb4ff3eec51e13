// One node of a graph: its attributes read once, its inputs checked against the contract.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "contract.h"
#include "element.h"
#include "run.h"
#include "selection.h"

namespace nmexport {

// Reads attributes as the contract describes them.
class Attributes {
  public:
    Attributes(NodeInfo node, const OpSpec& spec) : mNode(std::move(node)), mSpec(spec) {}

    // Throws Fault where the attribute is missing, of another type, or out of range.
    std::int64_t integer(const char* name) const;
    std::string text(const char* name) const;
    // n and m, with n <= m.
    Pattern pattern() const;

  private:
    const AttributeSpec& find(const char* name) const;
    [[noreturn]] void fail(const AttributeSpec& attribute, const std::string& problem) const;

    NodeInfo mNode;
    const OpSpec& mSpec;
};

// Shapes and constants of a node's inputs, as far as they are known before it runs.
class InputShapes {
  public:
    InputShapes(const NodeInfo& node, const OpSpec& spec);

    // Null if the input is absent or not constant.
    const Shape* constantShape(int input) const;
    const void* constantData(int input) const { return mData[static_cast<std::size_t>(input)]; }

  private:
    std::vector<std::optional<Shape>> mConstant;
    std::vector<const void*> mData;
};

// The inputs of one run.
class Inputs {
  public:
    Inputs(const Run& run, const OpSpec& spec, const InputShapes& shapes)
        : mRun(run), mSpec(spec), mShapes(shapes) {}

    bool has(int input) const { return mRun.has(static_cast<std::size_t>(input)); }
    // Reads it only where it was not known before.
    Shape shape(int input) const;
    // Null where the input is absent.
    const void* data(int input) const { return mRun.data(static_cast<std::size_t>(input)); }
    // The same, of an input that must have one of the given sizes and rank 1.
    const void* vector(int input, std::int64_t size, std::int64_t otherSize = -1) const;

  private:
    const Run& mRun;
    const OpSpec& mSpec;
    const InputShapes& mShapes;
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

}  // namespace nmexport
