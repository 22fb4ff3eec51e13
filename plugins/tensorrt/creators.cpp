#include "creators.h"

#include "logging.h"
#include "nm_linear_plugin.h"
#include "nm_prune_plugin.h"
#include "settings.h"

namespace nmexport::trt {

using namespace nvinfer1;

NmPluginCreator::NmPluginCreator(const OpSpec& spec) : mSpec(spec) {
    for (std::size_t i = 0; i < spec.attributeCount; ++i) {
        const AttributeSpec& attribute = spec.attributes[i];
        mFields.emplace_back(attribute.name, nullptr,
                             attribute.isString ? PluginFieldType::kCHAR : PluginFieldType::kINT32,
                             1);
    }
    mFields.emplace_back(kINPUTS_FIELD, nullptr, PluginFieldType::kCHAR, 1);
    mCollection = {static_cast<std::int32_t>(mFields.size()), mFields.data()};
}

IPluginV3* NmPluginCreator::createPlugin(AsciiChar const* name, PluginFieldCollection const* fields,
                                         TensorRTPhase phase) noexcept {
    const char* node = name == nullptr ? "" : name;
    return guarded(mSpec.name, node, static_cast<IPluginV3*>(nullptr), [&]() -> IPluginV3* {
        Settings settings = phase == TensorRTPhase::kRUNTIME
                                ? settingsFromPlan(mSpec, node, fields)
                                : settingsFromNode(mSpec, node, fields);
        if (&mSpec == &kNMPrune) return new NmPrunePlugin(std::move(settings));
        return new NmLinearPlugin(std::move(settings));
    });
}

PluginFieldCollection const* NmPluginCreator::getFieldNames() noexcept {
    return &mCollection;
}

AsciiChar const* NmPluginCreator::getPluginName() const noexcept {
    return mSpec.name;
}

AsciiChar const* NmPluginCreator::getPluginVersion() const noexcept {
    return kPLUGIN_VERSION;
}

AsciiChar const* NmPluginCreator::getPluginNamespace() const noexcept {
    return kPLUGIN_NAMESPACE;
}

}  // namespace nmexport::trt
