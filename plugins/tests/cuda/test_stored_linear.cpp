// Linears on stored weights, as the executor runs them, on kernels that only take notes: which
// path, which tiles, how much workspace; and the plans by rule.
#include "../tensorrt/recording_kernels.h"
#include "linear_executor.h"
#include "stored.h"

#include <cstdio>
#include <cstdlib>
#include <string>

namespace nmexport::cuda {
namespace {

int failures = 0;

void check(bool ok, char const* what) {
    if (!ok) {
        ++failures;
        std::printf("FAILED %s\n", what);
    }
}

constexpr DeviceTraits kH200{90, 132, 227 << 10};

//! A linear on int8 rows, pruned 8:16 unless asked otherwise; pointers are never followed.
LinearArgs linearOf(int64_t tokens, int32_t channels, int32_t outputs) {
    static uint64_t somewhere[64];
    void* const aligned =
        reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(somewhere) + 63) / 64 * 64);
    LinearArgs args;
    args.type = DType::kFLOAT16;
    args.tokens = tokens;
    args.channels = channels;
    args.outputs = outputs;
    args.x = args.w = aligned;
    args.y = aligned;
    args.stored.type = WeightType::kINT8;
    args.stored.scale = aligned;
    return args;
}

//! What a run launches, in order.
std::string launchesOf(LinearArgs const& args, DeviceTraits const& device = kH200) {
    test::launches() = {};
    LinearExecutor executor;
    executor.run(args, device, LinearPath::kFASTER, nullptr, nullptr);
    std::string order;
    for (std::string const& launch : test::launches().order) {
        order += launch + " ";
    }
    return order;
}

void checkPaths() {
    LinearArgs few = linearOf(17, 4096, 4096);
    check(launchesOf(few) == "mask widen product ", "more than sixteen tokens are widened");
    few.tokens = 2;
    check(launchesOf(few) == "mask stored ", "a selection is made before the kernel");
    few.isPruned = true;
    few.selection.n = few.selection.m;
    check(launchesOf(few) == "stored ", "a pruned x goes straight in");
    check(workspaceBytes(workOf(few), kH200, LinearPath::kFASTER) == 0, "and needs no workspace");
    check(launchesOf(few, {75, 72, 64 << 10}) == "widen product ", "an older chip widens");
    few.type = DType::kFLOAT32;
    check(launchesOf(few) == "widen product ", "float32 is widened");
    few.type = DType::kFLOAT16;
    few.outputs = 8200;
    check(launchesOf(few) == "widen product widen product ",
          "rows off 16 bytes are widened, the last columns as a tile of their own");
}

void checkTiles() {
    LinearArgs many = linearOf(100, 14336, 10240);
    many.isPruned = true;
    many.selection.n = many.selection.m;
    launchesOf(many);
    int32_t next = 0;
    for (size_t i = 0; i < test::launches().tiles.size(); ++i) {
        WidenArgs const& tile = test::launches().tiles[i];
        ProductShape const& product = test::launches().products.at(i);
        check(tile.firstColumn == next, "tiles follow each other");
        check(tile.columns <= 4096, "a tile is bounded");
        check(product.outputs == tile.columns && product.resultStride == 10240,
              "a product of the tile's columns, at the stride of y");
        next += tile.columns;
    }
    check(next == 10240, "tiles cover W");
    size_t const bytes = workspaceBytes(workOf(many), kH200, LinearPath::kFASTER);
    check(bytes > kPRODUCT_WORKSPACE_BYTES && bytes < size_t{160} << 20,
          "the workspace is bounded");
}

void checkRows() {
    LinearArgs args = linearOf(1, 4096, 4096);
    check(hasStoredRows(args), "int8 rows");
    args.stored.groups = 4096 / 32;
    check(hasStoredRows(args) && groupShiftOf(args) == 5, "groups of 32");
    args.stored.groups = 4096 / 8;
    check(!hasStoredRows(args), "groups of 8");
    args = linearOf(1, 4608, 4096);
    args.stored.groups = 4608 / 48;
    check(!hasStoredRows(args), "groups of 48");
    args = linearOf(1, 4096, 4112);
    check(hasStoredRows(args), "16 columns a vector");
    args.stored.type = WeightType::kUINT4;
    check(!hasStoredRows(args), "32 columns a vector");
}

//! All of a plan's blocks are resident at once, and it is one that is compiled.
void checkPlans() {
    for (WeightType const type : {WeightType::kINT8, WeightType::kINT4}) {
        for (int32_t const channels : {64, 576, 4096, 14336}) {
            for (int32_t const outputs : {64, 4096, 6144, 14336, 28672}) {
                LinearArgs args = linearOf(1, channels, outputs);
                args.stored.type = type;
                DecodePlan const plan = storedPlan(args, kH200);
                bool isCompiled = false;
                for (StoredPlanShape const& shape : kSTORED_SHAPES) {
                    isCompiled =
                        isCompiled || (shape.warps == plan.warps && shape.unroll == plan.unroll);
                }
                bool const isWide = type == WeightType::kINT4 && plan.unroll == 4;
                int32_t const columns = isWide ? 256 : 128;
                int32_t const tiles = (outputs + columns - 1) / columns;
                check(isCompiled, "a compiled shape");
                check(plan.cluster >= 1 && plan.cluster <= 8, "a cluster of up to 8");
                check(plan.cluster == 1 ||
                          tiles * plan.cluster * plan.warps <= 132 * plan.residentWarps,
                      "resident at once");
            }
        }
    }
}

//! What was fastest on an H200, pruned 8:16: the rule gives it.
void checkMeasuredPlans() {
    struct Fastest {
        WeightType type;
        int32_t channels, outputs, warps, unroll, cluster;
    };

    constexpr Fastest kFASTEST[] = {
        {WeightType::kINT8, 4096, 4096, 8, 4, 6},   {WeightType::kINT8, 4096, 6144, 8, 8, 4},
        {WeightType::kINT8, 4096, 14336, 4, 8, 4},  {WeightType::kINT8, 4096, 28672, 4, 8, 2},
        {WeightType::kINT8, 14336, 4096, 8, 8, 6},  {WeightType::kINT4, 4096, 4096, 8, 8, 4},
        {WeightType::kINT4, 4096, 6144, 8, 8, 4},   {WeightType::kINT4, 4096, 14336, 8, 4, 4},
        {WeightType::kINT4, 4096, 28672, 16, 4, 1}, {WeightType::kINT4, 14336, 4096, 16, 4, 6}};
    for (Fastest const& f : kFASTEST) {
        LinearArgs args = linearOf(1, f.channels, f.outputs);
        args.stored.type = f.type;
        DecodePlan const plan = storedPlan(args, kH200);
        check(plan.warps == f.warps && plan.unroll == f.unroll && plan.cluster == f.cluster,
              "the fastest plan of a measured shape");
        check(storedPlan(args, {80, 108, 163 << 10}).cluster == 1, "no cluster on an older chip");
    }
}

}  // namespace
}  // namespace nmexport::cuda

int main() {
    nmexport::cuda::checkPaths();
    nmexport::cuda::checkTiles();
    nmexport::cuda::checkRows();
    nmexport::cuda::checkPlans();
    nmexport::cuda::checkMeasuredPlans();
    std::printf("%d failed\n", nmexport::cuda::failures);
    return nmexport::cuda::failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
