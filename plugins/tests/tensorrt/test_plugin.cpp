// The plugin classes driven as TensorRT drives them, without TensorRT and without a GPU.
#include <memory>

#include "../expect.h"
#include "builder_side.h"
#include "creators.h"
#include "failing_memory.h"
#include "logging.h"
#include "nm_linear_plugin.h"
#include "plan_table.h"
#include "recording_kernels.h"

extern "C" nvinfer1::IPluginCreatorInterface* const* getCreators(std::int32_t& count);
extern "C" void setLoggerFinder(nvinfer1::ILoggerFinder* finder);
extern "C" const char* nmexport_describe_plugin();
extern "C" void nmexport_log_to(nmexport::trt::Sink sink);

namespace nmexport::test {

using namespace nvinfer1;

namespace {

constexpr auto kHALF = DataType::kHALF;
constexpr auto kFLOAT = DataType::kFLOAT;

using Plugin = std::unique_ptr<IPluginV3>;

IPluginCreatorV3One& creatorOf(const std::string& op) {
    std::int32_t count = 0;
    IPluginCreatorInterface* const* creators = getCreators(count);
    for (std::int32_t i = 0; i < count; ++i) {
        auto* creator = static_cast<IPluginCreatorV3One*>(creators[i]);
        if (creator->getPluginName() == op) return *creator;
    }
    std::abort();
}

Plugin make(const std::string& op, Fields& fields) {
    return Plugin(
        creatorOf(op).createPlugin("layer.0", fields.collection(), TensorRTPhase::kBUILD));
}

Fields pattern(std::int32_t n, std::int32_t m) {
    Fields fields;
    fields.integer("n", n).integer("m", m);
    return fields;
}

template <typename Capability>
Capability& as(IPluginV3& plugin, PluginCapabilityType type) {
    return *static_cast<Capability*>(plugin.getCapabilityInterface(type));
}
IPluginV3OneBuild& build(IPluginV3& plugin) {
    return as<IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD);
}
IPluginV3OneRuntime& runtime(IPluginV3& plugin) {
    return as<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME);
}

// The steps of a build up to output types and shapes; what the first refusal returned, or 0.
int shapesOf(IPluginV3& plugin, const std::vector<Tensor>& tensors,
             std::vector<std::int64_t>* output = nullptr) {
    std::vector<DataType> types;
    ExpressionBuilder expressions;
    std::vector<DimsExprs> shapes;
    for (const Tensor& tensor : tensors) {
        types.push_back(tensor.type);
        shapes.push_back(expressions.shape(tensor.sizes));
    }
    const auto count = static_cast<std::int32_t>(tensors.size());
    DataType type{};
    if (int status = build(plugin).getOutputDataTypes(&type, 1, types.data(), count)) return status;
    EXPECT(type == tensors[0].type);
    DimsExprs shape{};
    if (int status = build(plugin).getOutputShapes(shapes.data(), count, nullptr, 0, &shape, 1,
                                                   expressions)) {
        return status;
    }
    if (output != nullptr) {
        output->clear();
        for (std::int32_t i = 0; i < shape.nbDims; ++i) {
            output->push_back(shape.d[i]->isConstant() ? shape.d[i]->getConstantValue() : -1);
        }
    }
    return 0;
}

// Everything TensorRT does with a plugin in one run: attach, announce shapes, enqueue.
struct Run {
    Plugin attached;
    int status;
};

Run run(IPluginV3& plugin, const std::vector<Tensor>& tensors, const Tensor& y,
        std::int32_t tactic = 0) {
    std::vector<PluginTensorDesc> inputs;
    std::vector<std::vector<char>> storage;
    std::vector<const void*> data;
    for (const Tensor& tensor : tensors) {
        inputs.push_back(describe(tensor));
        storage.emplace_back(16);  // the recording kernels read nothing
        data.push_back(storage.back().data());
    }
    const PluginTensorDesc output = describe(y);
    const auto count = static_cast<std::int32_t>(tensors.size());
    Plugin attached(runtime(plugin).attachToContext(nullptr));
    if (attached == nullptr) return {nullptr, -1};
    IPluginV3OneRuntime& side = runtime(*attached);
    if (tactic != 0) side.setTactic(tactic);
    if (int status = side.onShapeChange(inputs.data(), count, &output, 1)) {
        return {std::move(attached), status};
    }
    std::vector<char> workspace(1);
    std::vector<char> result(1);
    void* outputs[] = {result.data()};
    const int status =
        side.enqueue(inputs.data(), &output, data.data(), outputs, workspace.data(), nullptr);
    return {std::move(attached), status};
}

struct Session {
    RecordingLogger logger;
    Finder finder{logger};
    Session() {
        launches() = {};
        setLoggerFinder(&finder);
    }
    ~Session() { setLoggerFinder(nullptr); }
};

void creatorsAreNamedAsTheContractSays() {
    std::int32_t count = 0;
    EXPECT(getCreators(count) != nullptr);
    EXPECT(count == 2);
    for (const char* op : {"NMPrune", "NMLinear"}) {
        IPluginCreatorV3One& creator = creatorOf(op);
        EXPECT(std::string(creator.getPluginVersion()) == "2");
        EXPECT(std::string(creator.getPluginNamespace()).empty());
        const PluginFieldCollection* names = creator.getFieldNames();
        EXPECT(std::string(names->fields[0].name) == "n");
        EXPECT(names->nbFields == (std::string(op) == "NMPrune" ? 3 : 8));
    }
    EXPECT(std::string(nmexport_describe_plugin()).find("\"version\": \"9.8.7\"") !=
           std::string::npos);
}

// A wrong field gives no plugin and a message with node, field, value and what is allowed.
void wrongFieldsAreRefused() {
    struct Case {
        Fields fields;
        std::vector<std::string> said;
    };
    std::vector<Case> cases;
    cases.push_back({pattern(0, 16), {"field n is 0", "an integer from 1 to 64"}});
    cases.push_back({pattern(8, 65), {"field m is 65", "1 to 64"}});
    cases.push_back({pattern(9, 8), {"field n is 9 and field m is 8"}});
    cases.push_back({Fields().integer("n", 8), {"field m is missing"}});
    cases.push_back({Fields().number("n", 8).integer("m", 16), {"field n is float32"}});
    cases.push_back({pattern(8, 16).integer("blocks", 1),
                     {"field blocks is not known", "n, m, dynamic_shift"}});
    cases.push_back({pattern(8, 16).text("phase", "sometimes"),
                     {"field phase is \"sometimes\"", "all, prefill, decode"}});
    cases.push_back({pattern(8, 16).text("phase", "all|decode"), {"field phase"}});
    cases.push_back({pattern(8, 16).integer("phase", 1), {"field phase is int32"}});
    cases.push_back({pattern(8, 16).integer("dynamic_shift", 2), {"field dynamic_shift is 2"}});
    cases.push_back({pattern(8, 16).integer("activation_bits", 8),
                     {"field activation_bits is 8", "allowed on a GPU: 0"}});
    cases.push_back({pattern(8, 16).text("present_inputs", "X,weights"),
                     {"present_inputs", "\"weights\" does not belong", "X,W,bias"}});
    cases.push_back({pattern(8, 16).text("present_inputs", "W,X"), {"\"X\" does not belong"}});
    for (Case& each : cases) {
        Session session;
        EXPECT(make("NMLinear", each.fields) == nullptr);
        EXPECT(session.logger.has("nmexport NMLinear \"layer.0\": "));
        for (const std::string& part : each.said) EXPECT(session.logger.has(part));
    }
    Session session;
    EXPECT(creatorOf("NMPrune").createPlugin("x", nullptr, TensorRTPhase::kBUILD) == nullptr);
    EXPECT(session.logger.has("no fields were given"));
}

void wideIntegersAreTaken() {
    Session session;
    Fields fields;
    fields.longInteger("n", 8).longInteger("m", 16);
    EXPECT(make("NMPrune", fields) != nullptr);
}

void wrongTensorsAreRefused() {
    const Tensor x{{-1, -1, 32}, kHALF};
    const Tensor w{{32, 48}, kHALF};
    struct Case {
        Fields fields;
        std::vector<Tensor> tensors;
        std::string said;
    };
    std::vector<Case> cases;
    cases.push_back({pattern(8, 24), {x, w}, "a positive multiple of field m, 24"});
    cases.push_back({pattern(8, 16), {x, {{48, 32}, kHALF}}, "input W has shape [48, 32]"});
    cases.push_back(
        {pattern(8, 16), {x, {{32, 48}, kFLOAT}}, "input W is float32; allowed: float16"});
    cases.push_back({pattern(8, 16), {{{-1, 32}, DataType::kINT8}, w}, "input X is int8"});
    cases.push_back({pattern(8, 16), {x}, "input W is missing"});
    cases.push_back(
        {pattern(8, 16), {x, w, {{47}, kHALF}}, "input bias has shape [47]; allowed: [48]"});
    cases.push_back({pattern(8, 16).text("present_inputs", "X,W,score_scale"),
                     {x, w, {{31}, kFLOAT}},
                     "input score_scale has shape [31]"});
    cases.push_back({pattern(8, 16).text("present_inputs", "X,W,channel_order"),
                     {x, w, {{32}, kFLOAT}},
                     "input channel_order is float32; allowed: int32"});
    cases.push_back(
        {pattern(8, 16).text("present_inputs", "X,W"), {x, w, w}, "the node has 3 inputs"});
    cases.push_back(
        {pattern(8, 16).integer("dynamic_shift", 1), {x, w}, "shift_weight is missing"});
    cases.push_back({pattern(8, 16).text("present_inputs", "X,W,dense_bias"),
                     {x, w, {{48}, kHALF}},
                     "input dense_bias is given and field phase is \"all\""});
    cases.push_back(
        {pattern(8, 16).text("phase", "decode").text("present_inputs", "X,W,dense_bias"),
         {x, w, {{32}, kHALF}},
         "input dense_bias has shape [32]; allowed: [48]"});
    cases.push_back({pattern(8, 16)
                         .integer("dynamic_shift", 1)
                         .text("present_inputs", "X,W,shift,shift_weight"),
                     {x, w, {{1}, kFLOAT}, {{48}, kFLOAT}},
                     "input shift is given"});
    cases.push_back({pattern(8, 16), {{{}, kHALF}, w}, "input X is a scalar"});
    cases.push_back({pattern(8, 16).text("present_inputs", "X,W,weight_scale"),
                     {x, {{32, 48}, DataType::kINT8}, {{1, 48}, kFLOAT}},
                     "input weight_scale is given"});
    for (Case& each : cases) {
        Session session;
        Plugin plugin = make("NMLinear", each.fields);
        EXPECT(plugin != nullptr);
        EXPECT(shapesOf(*plugin, each.tensors) != 0);
        EXPECT(session.logger.has(each.said));
    }
}

void outputsFollowTheInputs() {
    Session session;
    Fields fields = pattern(8, 16);
    std::vector<std::int64_t> y;
    Plugin linear = make("NMLinear", fields);
    EXPECT(shapesOf(*linear, {{{-1, -1, 32}, kHALF}, {{32, 48}, kHALF}}, &y) == 0);
    EXPECT((y == std::vector<std::int64_t>{-1, -1, 48}));
    Plugin prune = make("NMPrune", fields);
    EXPECT(shapesOf(*prune, {{{-1, 32}, kFLOAT}}, &y) == 0);
    EXPECT((y == std::vector<std::int64_t>{-1, 32}));
    EXPECT(session.logger.lines.empty());
}

void formatsAreLinearAndOfOneType() {
    Session session;
    Fields fields = pattern(8, 16).text("present_inputs", "X,W,score_scale,channel_order");
    Plugin plugin = make("NMLinear", fields);
    const std::vector<Tensor> tensors{{{4, 32}, kHALF},
                                      {{32, 48}, kHALF},
                                      {{32}, kFLOAT},
                                      {{32}, DataType::kINT32},
                                      {{4, 48}, kHALF}};
    std::vector<DynamicPluginTensorDesc> all;
    for (const Tensor& tensor : tensors) all.push_back(describe(tensor, 1, 4));
    for (std::int32_t i = 0; i < 5; ++i) {
        EXPECT(build(*plugin).supportsFormatCombination(i, all.data(), 4, 1));
        const PluginTensorDesc before = all[static_cast<std::size_t>(i)].desc;
        all[static_cast<std::size_t>(i)].desc.format = TensorFormat::kCHW32;
        EXPECT(!build(*plugin).supportsFormatCombination(i, all.data(), 4, 1));
        all[static_cast<std::size_t>(i)].desc = before;
        all[static_cast<std::size_t>(i)].desc.type = DataType::kINT8;
        EXPECT(!build(*plugin).supportsFormatCombination(i, all.data(), 4, 1));
        all[static_cast<std::size_t>(i)].desc = before;
    }
}

std::vector<std::int32_t> tacticsFor(std::int64_t least, std::int64_t most) {
    Fields fields = pattern(8, 16);
    Plugin plugin = make("NMLinear", fields);
    const DynamicPluginTensorDesc inputs[] = {describe({{1, 32}, kHALF}, least, most),
                                              describe({{32, 48}, kHALF}, 32, 32)};
    EXPECT(build(*plugin).configurePlugin(inputs, 2, nullptr, 1) == 0);
    std::vector<std::int32_t> tactics(static_cast<std::size_t>(build(*plugin).getNbTactics()));
    EXPECT(build(*plugin).getValidTactics(tactics.data(),
                                          static_cast<std::int32_t>(tactics.size())) == 0);
    return tactics;
}

void tacticsDependOnTheTokens() {
    Session session;
    EXPECT((tacticsFor(1, 1) == std::vector<std::int32_t>{1, 2}));
    EXPECT((tacticsFor(1, 64) == std::vector<std::int32_t>{1, 2}));
    EXPECT((tacticsFor(8, 64) == std::vector<std::int32_t>{2}));
    Fields fields = pattern(8, 16);
    Plugin plugin = make("NMLinear", fields);
    EXPECT(build(*plugin).getValidTactics(nullptr, 0) != 0);
    EXPECT(session.logger.has("room for 0 tactics of 2"));
    Plugin prune = make("NMPrune", fields);
    EXPECT(build(*prune).getNbTactics() == 0);
}

void workspaceHoldsTheMostTokens() {
    Session session;
    Fields fields = pattern(8, 16);
    Plugin plugin = make("NMLinear", fields);
    const DynamicPluginTensorDesc inputs[] = {describe({{1, 32}, kHALF}, 1, 100),
                                              describe({{32, 48}, kHALF}, 32, 32)};
    EXPECT(build(*plugin).configurePlugin(inputs, 2, nullptr, 1) == 0);
    const std::size_t bytes = build(*plugin).getWorkspaceSize(inputs, 2, nullptr, 1);
    const std::size_t tensors = 100 * 32 * 2 + 2 * 100 * 4;
    EXPECT(bytes >= tensors + cuda::kPRODUCT_WORKSPACE_BYTES);
    EXPECT(bytes < tensors + cuda::kPRODUCT_WORKSPACE_BYTES + 5 * 256);
    // The float32 product is held where an epilogue follows, and nowhere else.
    Fields corrected = pattern(8, 16).integer("variance_correction", 1);
    Plugin other = make("NMLinear", corrected);
    EXPECT(build(*other).configurePlugin(inputs, 2, nullptr, 1) == 0);
    const std::size_t more = build(*other).getWorkspaceSize(inputs, 2, nullptr, 1);
    EXPECT(more >= bytes + 100 * 48 * 4 && more < bytes + 100 * 48 * 4 + 256);
}

void timingCacheIdsTellNodesApart() {
    Session session;
    Fields fields = pattern(8, 16);
    Fields same = pattern(8, 16);
    Fields other = pattern(8, 16).integer("variance_correction", 1);
    Plugin plugin = make("NMLinear", fields);
    Plugin copy(plugin->clone());
    const std::string id = build(*plugin).getTimingCacheID();
    EXPECT(id == build(*copy).getTimingCacheID());
    EXPECT(id == build(*make("NMLinear", same)).getTimingCacheID());
    EXPECT(id != build(*make("NMLinear", other)).getTimingCacheID());
    EXPECT(id != build(*make("NMPrune", fields)).getTimingCacheID());
}

void plansCarryEverything() {
    Session session;
    Fields fields = pattern(4, 8)
                        .integer("dynamic_shift", 1)
                        .integer("variance_correction", 1)
                        .text("phase", "decode")
                        .text("present_inputs", "X,W,shift_weight,channel_order");
    Plugin built = make("NMLinear", fields);
    SerialisedFields plan(*runtime(*built).getFieldsToSerialize());
    const std::string id = build(*built).getTimingCacheID();
    built.reset();
    IPluginCreatorV3One& creator = creatorOf("NMLinear");
    Plugin loaded(creator.createPlugin("layer.0", plan.collection(), TensorRTPhase::kRUNTIME));
    EXPECT(loaded != nullptr);
    EXPECT(id == build(*loaded).getTimingCacheID());
    // What a plan's plugin writes can be read again.
    SerialisedFields again(*runtime(*loaded).getFieldsToSerialize());
    Plugin third(creator.createPlugin("layer.0", again.collection(), TensorRTPhase::kRUNTIME));
    EXPECT(third != nullptr && id == build(*third).getTimingCacheID());

    plan.setInteger("plan_schema", 1);
    Plugin refused(creator.createPlugin("layer.0", plan.collection(), TensorRTPhase::kRUNTIME));
    EXPECT(refused == nullptr);
    EXPECT(session.logger.has("written by plugin library 9.8.7"));
    EXPECT(session.logger.has("field plan_schema is 1; allowed: 2"));
    Fields foreign = pattern(4, 8);
    EXPECT(creator.createPlugin("x", foreign.collection(), TensorRTPhase::kRUNTIME) == nullptr);
    EXPECT(session.logger.has("of unknown version"));
}

void fewTokensTakeTheDecodeKernel() {
    Session session;
    Fields fields = pattern(8, 16).text("present_inputs", "X,W,bias,score_scale,channel_order");
    Plugin plugin = make("NMLinear", fields);
    const std::vector<Tensor> tensors{{{2, 1, 32}, kHALF},
                                      {{32, 48}, kHALF},
                                      {{48}, kHALF},
                                      {{32}, kFLOAT},
                                      {{32}, DataType::kINT32}};
    const Run done = run(*plugin, tensors, {{2, 1, 48}, kHALF});
    EXPECT(done.status == 0);
    EXPECT((launches().order == std::vector<std::string>{"decode"}));
    const cuda::LinearArgs& args = launches().decodes.at(0);
    EXPECT(args.tokens == 2 && args.channels == 32 && args.outputs == 48);
    EXPECT(args.type == cuda::DType::kFLOAT16);
    EXPECT(args.selection.n == 8 && args.selection.m == 16);
    EXPECT(args.bias != nullptr && args.selection.scoreScale != nullptr);
    EXPECT(args.selection.channelOrder != nullptr && args.selection.shift == nullptr);
    EXPECT(args.shiftWeight == nullptr);
}

// The last launch for so many tokens of K 32 and O 48.
std::string pathOf(std::int64_t tokens) {
    Fields fields = pattern(8, 16);
    Plugin plugin = make("NMLinear", fields);
    const Run done =
        run(*plugin, {{{tokens, 32}, kHALF}, {{32, 48}, kHALF}}, {{tokens, 48}, kHALF});
    EXPECT(done.status == 0);
    return launches().order.back();
}

void theBreakEvenTableDecides() {
    Session session;
    EXPECT(pathOf(1) == "decode" && pathOf(2) == "decode");
    EXPECT(pathOf(3) == "product" && pathOf(4) == "product" && pathOf(5) == "product");
    // What a user measured on this chip, and on one whose shared memory four tokens do not fit.
    EXPECT(cuda::setPlanTable("89, 128, 2, 2, 32, 48, 0, 32, 1, 8, 8, 1, 24, 1, 0, 3, 2, 2\n"
                              "89, 128, 2, 4, 32, 48, 0, 32, 1, 8, 4, 1, 24, 1, 0, 1, 2, 2\n"
                              "75, 40, 2, 4, 32, 48, 0, 32, 1, 8, 4, 1, 24, 1, 0, 1, 2, 2\n") == 0);
    EXPECT(pathOf(2) == "product" && pathOf(4) == "decode");
    launches().device = {75, 40, 64 << 10};
    EXPECT(pathOf(4) == "product");
    cuda::usePlanTable({});
}

// A builder times a plugin that no context was attached to.
void aPluginOutsideOfAContextLearnsTheDevice() {
    Session session;
    Fields fields = pattern(8, 16);
    Plugin plugin = make("NMLinear", fields);
    const std::vector<PluginTensorDesc> inputs{describe({{1, 32}, kHALF}),
                                               describe({{32, 48}, kHALF})};
    const PluginTensorDesc output = describe({{1, 48}, kHALF});
    const void* data[] = {nullptr, nullptr};
    void* outputs[] = {nullptr};
    IPluginV3OneRuntime& side = runtime(*plugin);
    EXPECT(side.onShapeChange(inputs.data(), 2, &output, 1) == 0);
    EXPECT(side.enqueue(inputs.data(), &output, data, outputs, nullptr, nullptr) == 0);
    EXPECT((launches().order == std::vector<std::string>{"decode"}));
}

void manyTokensTakeMaskProductAndEpilogue() {
    Session session;
    Fields fields = pattern(8, 16)
                        .integer("dynamic_shift", 1)
                        .integer("variance_correction", 1)
                        .text("present_inputs", "X,W,shift_weight");
    Plugin plugin = make("NMLinear", fields);
    const std::vector<Tensor> tensors{{{1, 7, 32}, kHALF}, {{32, 48}, kHALF}, {{48}, kFLOAT}};
    EXPECT(run(*plugin, tensors, {{1, 7, 48}, kHALF}).status == 0);
    EXPECT(
        (launches().order == std::vector<std::string>{"prepare", "mask", "product", "epilogue"}));
    const cuda::MaskArgs& mask = launches().masks.at(0);
    EXPECT(mask.tokens == 7 && mask.eta != nullptr && mask.nu != nullptr);
    EXPECT(mask.selection.dynamicShift && mask.selection.varianceCorrection);
    const cuda::EpilogueArgs& epilogue = launches().epilogues.at(0);
    EXPECT(epilogue.eta == mask.eta && epilogue.nu == mask.nu);
    EXPECT(epilogue.product == launches().productResult && epilogue.shiftWeight != nullptr);
    EXPECT(launches().products.at(0).floatResult);
    // Parts of the workspace follow each other, aligned, without overlap.
    const auto at = [](const void* p) { return reinterpret_cast<std::uintptr_t>(p); };
    const std::uintptr_t base = at(mask.s);
    EXPECT(at(mask.eta) - base == 512 && at(mask.nu) - base == 768);
    EXPECT(at(epilogue.product) - base == 1024);
    EXPECT(at(launches().productWorkspace) - base == 1024 + 1536);
}

void aBareProductIsRoundedOnce() {
    Session session;
    Fields fields = pattern(8, 16);
    Plugin plugin = make("NMLinear", fields);
    EXPECT(run(*plugin, {{{7, 32}, kHALF}, {{32, 48}, kHALF}}, {{7, 48}, kHALF}).status == 0);
    EXPECT((launches().order == std::vector<std::string>{"prepare", "mask", "product"}));
    EXPECT(!launches().products.at(0).floatResult);
}

void theProductTacticTakesOneTokenToo() {
    Session session;
    Fields fields = pattern(8, 16);
    Plugin plugin = make("NMLinear", fields);
    const std::vector<Tensor> tensors{{{1, 1, 32}, kHALF}, {{32, 48}, kHALF}};
    EXPECT(run(*plugin, tensors, {{1, 1, 48}, kHALF}, trt::kTACTIC_PRODUCT).status == 0);
    EXPECT(launches().order.back() == "product");
    EXPECT(run(*plugin, tensors, {{1, 1, 48}, kHALF}, trt::kTACTIC_BY_TOKENS).status == 0);
    EXPECT(launches().order.back() == "decode");
}

void phasesKeepOtherTokensDense() {
    const Tensor w{{32, 48}, kHALF};
    for (const char* phase : {"all", "prefill", "decode"}) {
        Session session;
        Fields fields = pattern(8, 16).text("phase", phase);
        Plugin plugin = make("NMLinear", fields);
        EXPECT(run(*plugin, {{{2, 1, 32}, kHALF}, w}, {{2, 1, 48}, kHALF}).status == 0);
        EXPECT(run(*plugin, {{{1, 9, 32}, kHALF}, w}, {{1, 9, 48}, kHALF}).status == 0);
        const std::int32_t decode = launches().decodes.at(0).selection.n;
        EXPECT(decode == (std::string(phase) == "prefill" ? 16 : 8));
        // A dense prompt needs no mask: X itself meets W.
        const bool isDense = std::string(phase) == "decode";
        EXPECT(launches().masks.size() == (isDense ? 0 : 1));
        if (!isDense) EXPECT(launches().masks.at(0).selection.n == 8);
        EXPECT(launches().products.size() == 1);
    }
}

// Selection's constants serve tokens inside the phase; tokens outside it have their own two.
void tokensOutsideThePhaseTakeTheirOwnConstants() {
    const std::vector<Tensor> tensors{
        {{1, 7, 32}, kHALF},      {{32, 48}, kHALF}, {{48}, kHALF},  {{32}, kFLOAT}, {{32}, kFLOAT},
        {{32}, DataType::kINT32}, {{32}, kFLOAT},    {{32}, kFLOAT}, {{48}, kHALF}};
    for (const char* phase : {"prefill", "decode"}) {
        Session session;
        Fields fields = pattern(8, 16)
                            .integer("variance_correction", 1)
                            .text("phase", phase)
                            .text("present_inputs",
                                  "X,W,bias,shift,score_scale,channel_order,value_scale,"
                                  "dense_scale,dense_bias");
        Plugin plugin = make("NMLinear", fields);
        EXPECT(run(*plugin, tensors, {{1, 7, 48}, kHALF}).status == 0);
        const bool isDense = std::string(phase) == "decode";
        const cuda::Selection& selection = launches().masks.at(0).selection;
        EXPECT(selection.n == (isDense ? 16 : 8) && selection.channelOrder != nullptr);
        EXPECT(selection.valueScale != nullptr);
        EXPECT((selection.shift == nullptr) == isDense);
        EXPECT((selection.scoreScale == nullptr) == isDense);
        EXPECT(launches().epilogues.size() == (isDense ? 0 : 1));
    }
}

void aDenseTokenWithoutConstantsOfItsOwnIsABareProduct() {
    Session session;
    Fields fields = pattern(8, 16)
                        .integer("dynamic_shift", 1)
                        .integer("variance_correction", 1)
                        .text("phase", "decode")
                        .text("present_inputs", "X,W,bias,shift_weight,value_scale");
    Plugin plugin = make("NMLinear", fields);
    const std::vector<Tensor> tensors{
        {{1, 7, 32}, kHALF}, {{32, 48}, kHALF}, {{48}, kHALF}, {{48}, kFLOAT}, {{32}, kFLOAT}};
    EXPECT(run(*plugin, tensors, {{1, 7, 48}, kHALF}).status == 0);
    EXPECT((launches().order == std::vector<std::string>{"prepare", "product"}));
    EXPECT(!launches().products.at(0).hasBias);
}

void pruneTakesTheMaskKernelInPlace() {
    Session session;
    Fields fields = pattern(2, 4).text("present_inputs", "X,channel_order");
    Plugin plugin = make("NMPrune", fields);
    const std::vector<Tensor> tensors{{{5, 32}, kFLOAT}, {{32}, DataType::kINT32}};
    EXPECT(run(*plugin, tensors, {{5, 32}, kFLOAT}).status == 0);
    const cuda::MaskArgs& mask = launches().masks.at(0);
    EXPECT(mask.tokens == 5 && mask.channels == 32 && mask.selection.n == 2);
    EXPECT(mask.selection.channelOrder != nullptr && mask.keep == nullptr);
    EXPECT(mask.type == cuda::DType::kFLOAT32);
}

void failuresAreToldAndSurvived() {
    Session session;
    Fields fields = pattern(8, 16);
    Plugin plugin = make("NMLinear", fields);
    const std::vector<Tensor> few{{{1, 32}, kHALF}, {{32, 48}, kHALF}};
    const std::vector<Tensor> many{{{9, 32}, kHALF}, {{32, 48}, kHALF}};
    launches().noProduct = true;
    EXPECT(run(*plugin, many, {{9, 48}, kHALF}).status != 0);
    EXPECT(session.logger.has("cuBLASLt is not found"));
    EXPECT(run(*plugin, few, {{1, 48}, kHALF}).status == 0);  // decoding needs none
    launches().next = static_cast<cudaError_t>(700);
    EXPECT(run(*plugin, few, {{1, 48}, kHALF}).attached == nullptr);
    EXPECT(session.logger.has("asking the device what it is failed: cudaErrorTest"));
    launches().next = cudaSuccess;
    Plugin attached(runtime(*plugin).attachToContext(nullptr));
    launches().next = static_cast<cudaError_t>(700);
    std::vector<PluginTensorDesc> inputs{describe(few[0]), describe(few[1])};
    const PluginTensorDesc output = describe({{1, 48}, kHALF});
    EXPECT(runtime(*attached).onShapeChange(inputs.data(), 2, &output, 1) == 0);
    const void* data[] = {nullptr, nullptr};
    void* outputs[] = {nullptr};
    EXPECT(runtime(*attached).enqueue(inputs.data(), &output, data, outputs, nullptr, nullptr) !=
           0);
    EXPECT(session.logger.has("the decode kernel failed: cudaErrorTest"));
}

std::vector<std::string>& sunk() {
    static std::vector<std::string> lines;
    return lines;
}

void hostsWithoutAFinderHaveASink() {
    nmexport_log_to([](std::int32_t severity, const char* message) {
        sunk().push_back(std::to_string(severity) + " " + message);
    });
    Fields fields = pattern(0, 16);
    EXPECT(make("NMLinear", fields) == nullptr);
    EXPECT(sunk().size() == 1 && sunk()[0].find("1 nmexport NMLinear \"layer.0\"") == 0);
    {
        Session session;  // a finder comes first
        EXPECT(make("NMLinear", fields) == nullptr);
        EXPECT(session.logger.lines.size() == 1);
    }
    nmexport_log_to(nullptr);
    EXPECT(make("NMLinear", fields) == nullptr);  // stderr
    EXPECT(sunk().size() == 1);
}

// Counts, so that it needs no memory of its own.
class CountingLogger : public ILogger {
  public:
    void log(Severity, AsciiChar const*) noexcept override { ++count; }
    int count{0};
};

// Calls with ever more memory until one succeeds; how many failed, each after one message.
template <typename Call>
int failuresBefore(const Call& succeeds) {
    CountingLogger logger;
    Finder finder{logger};
    setLoggerFinder(&finder);
    int allowed = 0;
    for (bool done = false; !done && allowed < 1000; ++allowed) {
        const FailingMemory memory(allowed);
        done = succeeds();
    }
    setLoggerFinder(nullptr);
    EXPECT(logger.count == allowed - 1);
    return allowed - 1;
}

void runningOutOfMemoryIsToldAndSurvived() {
    launches() = {};
    Fields fields = pattern(8, 16).text("present_inputs", "X,W");
    const PluginFieldCollection* collection = fields.collection();
    IPluginCreatorV3One& creator = creatorOf("NMLinear");
    const char* name =
        "a name of a node that is too long to be kept inside of a std::string itself";
    IPluginV3* plugin = nullptr;
    EXPECT(failuresBefore([&] {
               plugin = creator.createPlugin(name, collection, TensorRTPhase::kBUILD);
               return plugin != nullptr;
           }) > 2);
    const Plugin owner(plugin);
    IPluginV3* copied = nullptr;
    EXPECT(failuresBefore([&] { return (copied = plugin->clone()) != nullptr; }) > 1);
    const Plugin ownerOfCopy(copied);
    IPluginV3* attached = nullptr;
    EXPECT(failuresBefore([&] {
               return (attached = runtime(*plugin).attachToContext(nullptr)) != nullptr;
           }) > 1);
    const Plugin ownerOfAttached(attached);
    EXPECT(failuresBefore([&] { return runtime(*plugin).getFieldsToSerialize() != nullptr; }) > 1);
    EXPECT(failuresBefore([&] { return build(*plugin).getTimingCacheID() != nullptr; }) > 1);
}

void noTokensIsNoWork() {
    Session session;
    Fields fields = pattern(8, 16);
    Plugin plugin = make("NMLinear", fields);
    EXPECT(run(*plugin, {{{0, 32}, kHALF}, {{32, 48}, kHALF}}, {{0, 48}, kHALF}).status == 0);
    EXPECT(launches().order.empty());
}

}  // namespace

}  // namespace nmexport::test

int main() {
    using namespace nmexport::test;
    creatorsAreNamedAsTheContractSays();
    wrongFieldsAreRefused();
    wideIntegersAreTaken();
    wrongTensorsAreRefused();
    outputsFollowTheInputs();
    formatsAreLinearAndOfOneType();
    tacticsDependOnTheTokens();
    workspaceHoldsTheMostTokens();
    timingCacheIdsTellNodesApart();
    plansCarryEverything();
    fewTokensTakeTheDecodeKernel();
    theBreakEvenTableDecides();
    aPluginOutsideOfAContextLearnsTheDevice();
    manyTokensTakeMaskProductAndEpilogue();
    aBareProductIsRoundedOnce();
    theProductTacticTakesOneTokenToo();
    phasesKeepOtherTokensDense();
    tokensOutsideThePhaseTakeTheirOwnConstants();
    aDenseTokenWithoutConstantsOfItsOwnIsABareProduct();
    pruneTakesTheMaskKernelInPlace();
    failuresAreToldAndSurvived();
    runningOutOfMemoryIsToldAndSurvived();
    noTokensIsNoWork();
    hostsWithoutAFinderHaveASink();
    return report("tensorrt plugin");
}
