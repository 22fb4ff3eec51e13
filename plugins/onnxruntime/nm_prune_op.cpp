#include "nm_prune.h"

#include "cpu_kernels.h"
#include "node.h"

namespace nmexport {

namespace {

namespace Input = NMPruneInput;

class PruneKernel : public CpuKernel {
  public:
    PruneKernel(const NodeInfo& node, ElementType type, std::size_t threads)
        : CpuKernel(node.api(), threads),
          mType(type),
          mPattern(Attributes(node, kNMPrune).pattern()),
          mShapes(node, kNMPrune),
          mOrder(mShapes, Input::channel_order, kNMPrune) {}

    void compute(const Run& run) const override {
        const Inputs inputs(run, kNMPrune, mShapes);
        const Shape shape = inputs.shape(Input::X);
        const Rows rows = rowsOf(kNMPrune.name, shape, mPattern);

        PruneArguments arguments;
        arguments.type = mType;
        arguments.x = inputs.data(Input::X);
        arguments.y = run.output(0, shape);
        arguments.tokens = rows.tokens;
        arguments.channels = rows.channels;
        arguments.pattern = mPattern;
        arguments.scoreScale =
            static_cast<const float*>(inputs.vector(Input::score_scale, shape.back()));
        arguments.channelOrder = mOrder.of(inputs, rows.channels);
        nmPrune(arguments, run.threads());
    }

  private:
    ElementType mType;
    Pattern mPattern;
    InputShapes mShapes;
    ChannelOrder mOrder;
};

}  // namespace

std::unique_ptr<CpuKernel> makePruneKernel(const NodeInfo& node, ElementType type,
                                           const SessionSettings& settings) {
    return std::make_unique<PruneKernel>(node, type, settings.threads);
}

}  // namespace nmexport
