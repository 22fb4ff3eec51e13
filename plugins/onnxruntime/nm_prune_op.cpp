#include "nm_prune.h"

#include "custom_op.h"
#include "node.h"

namespace nmexport {

namespace {

namespace Input = NMPruneInput;

class PruneKernel : public Kernel {
  public:
    PruneKernel(const OrtApi& api, const OrtKernelInfo* info, ElementType type, std::size_t threads)
        : mApi(api),
          mType(type),
          mThreads(threads),
          mPattern(Attributes(api, info, kNMPrune).pattern()),
          mShapes(api, info, kNMPrune),
          mOrder(mShapes, Input::channel_order, kNMPrune) {}

    void run(OrtKernelContext* context) const override {
        const Inputs inputs(mApi, context, kNMPrune, mShapes);
        const Shape shape = inputs.shape(Input::X);
        const Rows rows = rowsOf(kNMPrune.name, shape, mPattern);

        PruneArguments arguments;
        arguments.type = mType;
        arguments.x = inputs.data(Input::X);
        arguments.y = outputData(mApi, context, shape);
        arguments.tokens = rows.tokens;
        arguments.channels = rows.channels;
        arguments.pattern = mPattern;
        arguments.scoreScale =
            static_cast<const float*>(inputs.vector(Input::score_scale, shape.back()));
        arguments.channelOrder = mOrder.of(inputs, rows.channels);
        Pool pool(mApi, context, mThreads);
        nmPrune(arguments, pool.threads());
    }

  private:
    const OrtApi& mApi;
    ElementType mType;
    std::size_t mThreads;
    Pattern mPattern;
    InputShapes mShapes;
    ChannelOrder mOrder;
};

}  // namespace

std::unique_ptr<Kernel> makePruneKernel(const OrtApi& api, const OrtKernelInfo* info,
                                        ElementType type, const SessionSettings& settings) {
    return std::make_unique<PruneKernel>(api, info, type, settings.threads);
}

}  // namespace nmexport
