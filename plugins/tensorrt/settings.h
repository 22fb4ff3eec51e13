// What a node was given: its fields and which of the contract's inputs it has, checked.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <string>
#include <vector>

#include "contract.h"

namespace nmexport::trt {

// Names of the contract's inputs that a node has, in order, parted by commas. TensorRT knows no
// absent input: a node that leaves an optional one out before another drops it and says so here.
// Without this field the tensors are the first inputs of the contract.
inline constexpr char kINPUTS_FIELD[] = "present_inputs";
// Written into plans only: what the fields mean, and who wrote them.
inline constexpr char kSCHEMA_FIELD[] = "plan_schema";
inline constexpr char kVERSION_FIELD[] = "library_version";
inline constexpr std::int32_t kPLAN_SCHEMA = 2;

enum class Phase { kALL, kPREFILL, kDECODE };

struct Settings {
    const OpSpec* spec{nullptr};
    std::string node;
    std::int32_t n{1};
    std::int32_t m{1};
    bool dynamicShift{false};
    bool varianceCorrection{false};
    Phase phase{Phase::kALL};
    std::vector<int> inputs;  // position in the contract of each tensor; empty until it is known

    // Position among the node's tensors of an input of the contract; -1 where it is absent.
    int tensorOf(int input) const;
    // Whether tokens of a sequence of this length are sparsified.
    bool sparsifies(std::int64_t sequence) const;
    // Everything that decides the result, as text that is the same in every process.
    std::string signature() const;
};

const char* nameOf(Phase phase);
// "X,W,bias": positions in the contract by name.
std::string inputNames(const OpSpec& spec, const std::vector<int>& inputs);

// Reads fields that a user or the parser gave. Throws Fault: field, value, what is allowed.
Settings settingsFromNode(const OpSpec& spec, const char* node,
                          const nvinfer1::PluginFieldCollection* fields);

// Reads fields that a plan carries. Throws Fault where another version of the library wrote them
// in a way that this one does not know.
Settings settingsFromPlan(const OpSpec& spec, const char* node,
                          const nvinfer1::PluginFieldCollection* fields);

// The fields of a plan; owns what the collection points to, so it must outlive its use.
class PlanFields {
  public:
    const nvinfer1::PluginFieldCollection* write(const Settings& settings);

  private:
    void addInteger(const char* name, const std::int32_t& value);
    void addText(const char* name, const std::string& value);

    Settings mSettings;
    std::int32_t mSchema{kPLAN_SCHEMA};
    std::int32_t mDynamicShift{0};
    std::int32_t mVarianceCorrection{0};
    std::string mPhase;
    std::string mInputs;
    std::string mVersion;
    std::vector<nvinfer1::PluginField> mFields;
    nvinfer1::PluginFieldCollection mCollection{};
};

}  // namespace nmexport::trt
