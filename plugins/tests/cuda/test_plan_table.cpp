// Plan tables on the CPU: the text form, the nearest row, plans for shapes that nobody measured,
// what fits which chip.
#include "decode_memory.h"
#include "plan_table.h"

#include <cstdio>
#include <cstdlib>

using namespace nmexport::cuda;

namespace {

int failures = 0;

void check(bool ok, char const* what) {
    if (!ok) {
        ++failures;
        std::printf("FAILED %s\n", what);
    }
}

constexpr DeviceTraits kH100{90, 132, 227 << 10};
//! One chip at least of every capability that the kernels are compiled for, with the shared memory
//! that a block may opt in to; the last two run code of 10.0 and 12.0.
constexpr DeviceTraits kCHIPS[] = {{75, 40, 64 << 10},    {75, 72, 64 << 10},
                                   {80, 108, 163 << 10},  {86, 84, 99 << 10},
                                   {89, 128, 99 << 10},   kH100,
                                   {100, 148, 227 << 10}, {120, 170, 99 << 10},
                                   {100, 20, 227 << 10},  {120, 48, 99 << 10}};
char const* const kROW =
    "{90, 132, 2, 1, 4096, 6144, 0, {32, 1, 8, 8, 1, 16, 8, 0}, 10.92F, 25.6F, 19.58F},\n";

void testTextForm() {
    PlanTable table;
    check(parsePlanTable(std::string("// a comment\n\n") + kROW, &table) == 0 && table.size() == 1,
          "a row is read");
    check(table[0].channels == 4096 && table[0].outputs == 6144 && table[0].plan.cluster == 8,
          "fields keep their order");
    check(table[0].sparseUs == 10.92F && table[0].denseUs == 19.58F, "times are read");
    check(parsePlanTable(std::string(kROW) + "90, 132, 2\n", &table) == 2 && table.size() == 1,
          "a short line is named");
    check(parsePlanTable("90, 132, 2, 1, 64, 64, 0, 32, 1, 8, 8, 1, 16, 8, 0, 1, 1, 1, 5\n",
                         &table) == 1,
          "a long line");
    check(parsePlanTable("90, 132, 2, 1, 64, 64, 0, 31, 1, 8, 8, 1, 16, 8, 0, 1, 1, 1\n", &table) ==
              1,
          "no such row width");
    check(parsePlanTable("90, 132, 2, 1, 64, 64, 0, 32, 1, 8, 8, 1, 16, 9, 0, 1, 1, 1\n", &table) ==
              1,
          "cluster too large");
    check(parsePlanTable("nonsense\n", &table) == 1 && table.size() == 1,
          "a faulty text leaves the table alone");
}

void testNearestRow() {
    PlanTable table;
    parsePlanTable(kROW, &table);
    auto const find = [&](int32_t k, int32_t o) {
        return findPlan(table, kH100, {DType::kFLOAT16, 1, k, o, false});
    };
    check(find(4096, 6144) == &table[0], "the measured shape");
    check(find(4096, 5120) == &table[0] && find(5120, 6144) == &table[0], "shapes nearby");
    check(find(4096, 3000) == nullptr && find(14336, 6144) == nullptr, "shapes far away");
    check(findPlan(table, kH100, {DType::kFLOAT32, 1, 4096, 6144, false}) == nullptr,
          "another element size");
    check(findPlan(table, kH100, {DType::kBFLOAT16, 2, 4096, 6144, false}) == nullptr,
          "another token count");
    check(findPlan(table, kH100, {DType::kBFLOAT16, 1, 4096, 6144, true}) == &table[0],
          "with a channel order, where nothing was measured with one");
    PlanTable both = table;
    both.push_back(table[0]);
    both[1].grouped = 1;
    check(findPlan(both, kH100, {DType::kBFLOAT16, 1, 4096, 6144, true}) == &both[1] &&
              findPlan(both, kH100, {DType::kBFLOAT16, 1, 4096, 6144, false}) == &both[0],
          "measured with a channel order and without");
    check(findPlan(table, {80, 108, 0}, {DType::kBFLOAT16, 1, 4096, 6144, false}) == nullptr,
          "another chip");
}

void testRuleIsLaunchable() {
    bool ok = true;
    for (DeviceTraits const& device : kCHIPS) {
        for (DType const type : {DType::kFLOAT32, DType::kFLOAT16}) {
            for (int32_t channels : {16, 64, 576, 4096, 14336}) {
                for (int32_t outputs : {1, 8, 576, 4096, 28672, 262144}) {
                    bool const isGrouped = outputs % 3 == 0;
                    DecodePlan const plan =
                        planByRule(device, {type, 1, channels, outputs, isGrouped});
                    ok = ok && plan.cluster >= 1 &&
                         plan.cluster <= (device.computeCapability >= 90 ? 8 : 1);
                    ok = ok && (plan.lanesPerRow == 8 || plan.lanesPerRow == 16 ||
                                plan.lanesPerRow == 32);
                    ok = ok && plan.warps == 8 && plan.vectors == 1;
                }
            }
        }
    }
    check(ok, "the rule gives plans that exist, clusters only where the chip has them");
}

//! The plan that a launch would use either fits the chip, or the launch is not asked for.
bool planIsSafe(DeviceTraits const& device, PlanRequest const& r) {
    DecodePlan const plan =
        decodePlan(device, r.type, r.tokens, r.channels, r.outputs, r.isGrouped);
    if (plan.cluster < 1) {
        return !decodeIsFaster(device, r.type, r.tokens, r.channels, r.outputs);
    }
    size_t const bytes = decodeSharedBytes(footprintOf(plan, r.type, r.tokens), plan.cluster);
    return bytes <= static_cast<size_t>(device.sharedBytesPerBlock) &&
           plan.cluster <= (device.computeCapability >= 90 ? 8 : 1);
}

void testEveryPlanFitsItsChip() {
    bool ok = true;
    for (DeviceTraits const& device : kCHIPS) {
        for (DType const type : {DType::kFLOAT32, DType::kFLOAT16, DType::kBFLOAT16}) {
            for (int32_t tokens = 1; tokens <= kMAX_DECODE_TOKENS; ++tokens) {
                for (int32_t channels : {16, 576, 4096, 14336}) {
                    for (int32_t outputs : {1, 576, 4096, 6144, 14336, 28672, 262144}) {
                        ok = ok && planIsSafe(device, {type, tokens, channels, outputs, false});
                        ok = ok && planIsSafe(device, {type, tokens, channels, outputs, true});
                    }
                }
            }
        }
        for (TunedShape const& s : kTUNED_SHAPES) {
            DecodePlan const plan{s.lanesPerRow,   s.vectors, s.warps, s.unroll, 1,
                                  s.residentWarps, 8,         0};
            ok = ok && fittingCluster(footprintOf(plan, DType::kFLOAT16, 1), 8,
                                      device.sharedBytesPerBlock) == 8;
        }
    }
    check(ok, "every plan fits its chip's shared memory, or is not asked for");
}

void testSharedMemoryOfFourTokens() {
    DecodePlan plan = planByRule(kH100, {DType::kBFLOAT16, 4, 4096, 6144, false});
    check(plan.lanesPerRow == 32 && plan.cluster == 8, "the rule asks for a full cluster");
    DecodeFootprint const footprint = footprintOf(plan, DType::kBFLOAT16, 4);
    check(decodeSharedBytes(footprint, 8) == 100512 && decodeSharedBytes(footprint, 1) == 70944,
          "bytes of a CTA");
    check(fittingCluster(footprint, 8, 227 << 10) == 8, "a large chip takes the whole cluster");
    check(fittingCluster(footprint, 8, 96 << 10) == 7, "a smaller one takes what fits");
    check(fittingCluster(footprint, 8, 64 << 10) == 0, "the smallest takes none");
    check(decodePlan({120, 170, 96 << 10}, DType::kBFLOAT16, 4, 4096, 4096).cluster == 7,
          "a plan is cut down");
    check(decodePlan({75, 72, 64 << 10}, DType::kBFLOAT16, 4, 4096, 4096).cluster == 0,
          "or says that it cannot run");
}

void testBreakEven() {
    constexpr DType kTYPE = DType::kBFLOAT16;
    DeviceTraits const unmeasured{89, 128, 99 << 10};
    check(decodeIsFaster(unmeasured, kTYPE, 2, 4096, 4096),
          "two tokens where nothing was measured");
    check(!decodeIsFaster(unmeasured, kTYPE, 3, 4096, 4096),
          "three tokens where nothing was measured");
    check(decodeIsFaster(kH100, kTYPE, 1, 4096, 6144) &&
              !decodeIsFaster(kH100, kTYPE, 4, 4096, 28672),
          "measured");
    check(decodeIsFaster(kH100, DType::kFLOAT32, 4, 4096, 4096), "measured, four tokens");
    check(!decodeIsFaster(kH100, kTYPE, 0, 4096, 6144) &&
              !decodeIsFaster(kH100, kTYPE, 5, 4096, 6144),
          "no kernel");
    check(setPlanTable("75, 72, 2, 4, 4096, 4096, 0, 32, 1, 8, 4, 1, 24, 1, 0, 1, 2, 2\n"
                       "89, 128, 2, 4, 4096, 4096, 0, 32, 1, 8, 4, 1, 24, 1, 0, 1, 2, 2\n") == 0,
          "a user's table");
    check(decodeIsFaster(unmeasured, kTYPE, 4, 4096, 4096), "the user measured four tokens");
    check(!decodeIsFaster({75, 72, 64 << 10}, kTYPE, 4, 4096, 4096),
          "a table cannot make a kernel fit");
    check(setPlanTable("nonsense") == 1, "a faulty table is named");
}

void testCompiledTable() {
    std::shared_ptr<PlanTable const> const compiled = activePlanTable();
    check(!compiled->empty(), "a table is compiled in");
    PlanTable own;
    parsePlanTable("90, 132, 2, 1, 4096, 6144, 0, 16, 1, 8, 8, 1, 24, 2, 0, 1, 1, 1\n", &own);
    usePlanTable(own);
    PlanRow const* const row =
        findPlan(*activePlanTable(), kH100, {DType::kBFLOAT16, 1, 4096, 6144, false});
    check(row != nullptr && row->plan.lanesPerRow == 16, "the user's rows come first");
    check(activePlanTable()->size() == compiled->size() + 1, "the compiled rows stay behind them");
}

}  // namespace

int main() {
    testTextForm();
    testNearestRow();
    testRuleIsLaunchable();
    testEveryPlanFitsItsChip();
    testSharedMemoryOfFourTokens();
    testCompiledTable();
    testBreakEven();
    std::printf("%d failed\n", failures);
    return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
