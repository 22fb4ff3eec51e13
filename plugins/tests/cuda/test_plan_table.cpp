// Plan tables on the CPU: the text form, the nearest row, plans for shapes that nobody measured.
#include "plan_table.h"

#include <cstdio>
#include <cstdlib>

using namespace nmexport::cuda;

namespace
{

int failures = 0;

void check(bool ok, char const* what)
{
    if (!ok)
    {
        ++failures;
        std::printf("FAILED %s\n", what);
    }
}

constexpr DeviceTraits kH100{90, 132, 227 << 10};
char const* const kROW = "{90, 132, 2, 1, 4096, 6144, 0, {32, 1, 8, 8, 1, 16, 8, 0}, 10.92F, 25.6F, 19.58F},\n";

void testTextForm()
{
    PlanTable table;
    check(parsePlanTable(std::string("// a comment\n\n") + kROW, &table) == 0 && table.size() == 1, "a row is read");
    check(table[0].channels == 4096 && table[0].outputs == 6144 && table[0].plan.cluster == 8, "fields keep their order");
    check(table[0].sparseUs == 10.92F && table[0].denseUs == 19.58F, "times are read");
    check(parsePlanTable(std::string(kROW) + "90, 132, 2\n", &table) == 2 && table.size() == 1, "a short line is named");
    check(parsePlanTable("90, 132, 2, 1, 64, 64, 0, 32, 1, 8, 8, 1, 16, 8, 0, 1, 1, 1, 5\n", &table) == 1, "a long line");
    check(parsePlanTable("90, 132, 2, 1, 64, 64, 0, 31, 1, 8, 8, 1, 16, 8, 0, 1, 1, 1\n", &table) == 1, "no such row width");
    check(parsePlanTable("90, 132, 2, 1, 64, 64, 0, 32, 1, 8, 8, 1, 16, 9, 0, 1, 1, 1\n", &table) == 1, "cluster too large");
    check(parsePlanTable("nonsense\n", &table) == 1 && table.size() == 1, "a faulty text leaves the table alone");
}

void testNearestRow()
{
    PlanTable table;
    parsePlanTable(kROW, &table);
    auto const find = [&](int32_t k, int32_t o) { return findPlan(table, kH100, {DType::kFLOAT16, 1, k, o, false}); };
    check(find(4096, 6144) == &table[0], "the measured shape");
    check(find(4096, 5120) == &table[0] && find(5120, 6144) == &table[0], "shapes nearby");
    check(find(4096, 3000) == nullptr && find(14336, 6144) == nullptr, "shapes far away");
    check(findPlan(table, kH100, {DType::kFLOAT32, 1, 4096, 6144, false}) == nullptr, "another element size");
    check(findPlan(table, kH100, {DType::kBFLOAT16, 2, 4096, 6144, false}) == nullptr, "another token count");
    check(findPlan(table, kH100, {DType::kBFLOAT16, 1, 4096, 6144, true}) == nullptr, "with a channel order");
    check(findPlan(table, {80, 108, 0}, {DType::kBFLOAT16, 1, 4096, 6144, false}) == nullptr, "another chip");
}

void testRuleIsLaunchable()
{
    bool ok = true;
    for (DeviceTraits const device : {DeviceTraits{75, 40, 0}, {80, 108, 0}, {89, 128, 0}, kH100, {120, 170, 0}})
    {
        for (DType const type : {DType::kFLOAT32, DType::kFLOAT16})
        {
            for (int32_t channels : {16, 64, 576, 4096, 14336})
            {
                for (int32_t outputs : {1, 8, 576, 4096, 28672, 262144})
                {
                    bool const isGrouped = outputs % 3 == 0;
                    DecodePlan const plan = planByRule(device, {type, 1, channels, outputs, isGrouped});
                    ok = ok && plan.cluster >= 1 && plan.cluster <= (device.computeCapability >= 90 ? 8 : 1);
                    ok = ok && (plan.lanesPerRow == 8 || plan.lanesPerRow == 16 || plan.lanesPerRow == 32);
                    ok = ok && plan.warps == 8 && plan.vectors == 1;
                }
            }
        }
    }
    check(ok, "the rule gives plans that exist, clusters only where the chip has them");
}

void testCompiledTable()
{
    std::shared_ptr<PlanTable const> const compiled = activePlanTable();
    check(!compiled->empty(), "a table is compiled in");
    PlanTable own;
    parsePlanTable("90, 132, 2, 1, 4096, 6144, 0, 16, 1, 8, 8, 1, 24, 2, 0, 1, 1, 1\n", &own);
    usePlanTable(own);
    PlanRow const* const row = findPlan(*activePlanTable(), kH100, {DType::kBFLOAT16, 1, 4096, 6144, false});
    check(row != nullptr && row->plan.lanesPerRow == 16, "the user's rows come first");
    check(activePlanTable()->size() == compiled->size() + 1, "the compiled rows stay behind them");
}

} // namespace

int main()
{
    testTextForm();
    testNearestRow();
    testRuleIsLaunchable();
    testCompiledTable();
    std::printf("%d failed\n", failures);
    return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
