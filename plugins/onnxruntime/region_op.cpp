// Region: nodes of ours that follow each other, as one node, which a team of threads runs.
#include <mutex>

#include "cpu_kernels.h"
#include "scratch.h"
#include "team.h"

namespace nmexport {

namespace {

// A tensor of a run.
struct Tensor {
    Shape shape;
    void* data = nullptr;
};

struct RegionNode {
    std::unique_ptr<CpuKernel> kernel;
    std::vector<std::int64_t> inputs;  // values, -1 where absent
    std::vector<std::int64_t> outputs;
};

// The place of a value that a node makes.
struct Place {
    bool leaves = false;    // the region: it is the runtime's memory
    std::size_t index = 0;  // of the region's output, or of a buffer
};

// The values of one run, and their memory: a buffer has one value after another.
struct Values {
    std::vector<Tensor> tensors;
    std::vector<Scratch<float>> buffers;
};

struct RegionRun {
    const Run& outer;
    const std::vector<Place>& places;  // of values behind the region's inputs
    Values& values;
    ThreadPool pool;
};

std::size_t elementsOf(const Shape& shape) {
    std::size_t count = 1;
    for (const std::int64_t size : shape) count *= static_cast<std::size_t>(size);
    return count;
}

// One node's run inside of the region's.
class InnerRun : public Run {
  public:
    InnerRun(RegionRun& region, const RegionNode& node) : mRegion(region), mNode(node) {}

    bool has(std::size_t input) const override {
        return input < mNode.inputs.size() && mNode.inputs[input] >= 0;
    }
    Shape shape(std::size_t input) const override { return tensor(input).shape; }
    void* data(std::size_t input) const override {
        return has(input) ? tensor(input).data : nullptr;
    }
    void* output(std::size_t index, const Shape& shape) const override {
        const std::size_t value = static_cast<std::size_t>(mNode.outputs[index]);
        const std::size_t inputs = mRegion.values.tensors.size() - mRegion.places.size();
        const Place& place = mRegion.places[value - inputs];
        Tensor& tensor = mRegion.values.tensors[value];
        tensor.shape = shape;
        tensor.data = place.leaves ? mRegion.outer.output(place.index, shape)
                                   : mRegion.values.buffers[place.index].reserve(elementsOf(shape));
        return tensor.data;
    }
    ThreadPool threads() const override { return mRegion.pool; }

  private:
    const Tensor& tensor(std::size_t input) const {
        return mRegion.values.tensors[static_cast<std::size_t>(mNode.inputs[input])];
    }

    RegionRun& mRegion;
    const RegionNode& mNode;
};

class RegionKernel : public CpuKernel {
  public:
    RegionKernel(const NodeInfo& region, const SessionSettings& settings)
        : CpuKernel(region.api(), settings.threads), mInputs(region.inputCount()) {
        const std::size_t count = static_cast<std::size_t>(region.integer("nodes"));
        for (std::size_t i = 0; i < count; ++i) addNode(region, i, settings);
        place(region.integers("outputs"));
        takeConstants(region);
    }

    void compute(const Run& run) const override {
        std::unique_ptr<Values> values = takeValues();
        for (const std::size_t input : mVarying) {
            values->tensors[input] = {run.shape(input), run.data(input)};
        }
        Team::gather(run.threads(), [&](const ThreadPool& pool) {
            RegionRun region{run, mPlaces, *values, pool};
            for (const RegionNode& node : mNodes) node.kernel->compute(InnerRun(region, node));
        });
        const std::lock_guard<std::mutex> lock(mMutex);
        mFree.push_back(std::move(values));
    }

  private:
    void addNode(const NodeInfo& region, std::size_t index, const SessionSettings& settings) {
        const std::string prefix = "node" + std::to_string(index) + "_";
        const NodeInfo names(region, prefix, {});
        RegionNode node;
        node.inputs = names.integers("inputs");
        node.outputs = names.integers("outputs");
        checkValues(node.inputs);
        for (const std::int64_t value : node.outputs) {
            if (value != static_cast<std::int64_t>(mInputs + mPlaces.size())) fail();
            mPlaces.emplace_back();
        }
        std::vector<std::int64_t> constants = node.inputs;
        for (std::int64_t& value : constants) {
            if (value >= static_cast<std::int64_t>(mInputs)) value = -1;
        }
        node.kernel = makeCpuKernel(names.text("op"), {region, prefix, constants}, settings);
        mNodes.push_back(std::move(node));
    }

    void checkValues(const std::vector<std::int64_t>& values) const {
        for (const std::int64_t value : values) {
            if (value < -1 || value >= static_cast<std::int64_t>(mInputs + mPlaces.size())) fail();
        }
    }

    [[noreturn]] static void fail() {
        throw Fault("Region: nodes name values that no node before them makes");
    }

    // Finds a place for each value: a buffer is free again behind the last node that reads it.
    void place(const std::vector<std::int64_t>& outputs) {
        checkValues(outputs);
        std::vector<std::size_t> lastReader(mInputs + mPlaces.size(), 0);
        for (std::size_t i = 0; i < mNodes.size(); ++i) {
            for (const std::int64_t value : mNodes[i].inputs) {
                if (value >= 0) lastReader[static_cast<std::size_t>(value)] = i;
            }
        }
        for (std::size_t i = 0; i < outputs.size(); ++i) {
            const std::size_t value = static_cast<std::size_t>(outputs[i]);
            if (value < mInputs) fail();
            mPlaces[value - mInputs] = {true, i};
        }
        std::vector<std::size_t> free;
        for (std::size_t i = 0; i < mNodes.size(); ++i) {
            for (const std::int64_t made : mNodes[i].outputs) {
                Place& place = mPlaces[static_cast<std::size_t>(made) - mInputs];
                if (place.leaves) continue;
                if (free.empty()) free.push_back(mBuffers++);
                place.index = free.back();
                free.pop_back();
            }
            const auto release = [&](const std::vector<std::int64_t>& values) {
                for (const std::int64_t value : values) {
                    if (value < static_cast<std::int64_t>(mInputs)) continue;
                    std::size_t& reader = lastReader[static_cast<std::size_t>(value)];
                    const Place& place = mPlaces[static_cast<std::size_t>(value) - mInputs];
                    if (place.leaves || reader > i) continue;
                    free.push_back(place.index);
                    reader = mNodes.size();  // released once
                }
            };
            release(mNodes[i].inputs);
            release(mNodes[i].outputs);  // what nobody reads
        }
    }

    void takeConstants(const NodeInfo& region) {
        mConstants.resize(mInputs + mPlaces.size());
        for (std::size_t i = 0; i < mInputs; ++i) {
            const OrtValue* value = region.constant(i);
            if (value == nullptr) {
                mVarying.push_back(i);
            } else {
                mConstants[i] = {shapeOf(region.api(), value), dataOf(region.api(), value)};
            }
        }
    }

    // Runs may overlap: each has values of its own.
    std::unique_ptr<Values> takeValues() const {
        const std::lock_guard<std::mutex> lock(mMutex);
        if (mFree.empty()) {
            return std::make_unique<Values>(
                Values{mConstants, std::vector<Scratch<float>>(mBuffers)});
        }
        std::unique_ptr<Values> values = std::move(mFree.back());
        mFree.pop_back();
        return values;
    }

    const std::size_t mInputs;
    std::vector<RegionNode> mNodes;
    std::vector<Place> mPlaces;
    std::size_t mBuffers = 0;
    std::vector<Tensor> mConstants;     // by value, with room for the others
    std::vector<std::size_t> mVarying;  // inputs that are no constants
    mutable std::mutex mMutex;
    mutable std::vector<std::unique_ptr<Values>> mFree;
};

}  // namespace

std::unique_ptr<CpuKernel> makeRegionKernel(const NodeInfo& node, const SessionSettings& settings) {
    return std::make_unique<RegionKernel>(node, settings);
}

}  // namespace nmexport
