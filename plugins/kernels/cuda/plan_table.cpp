#include "plan_table.h"

#include "decode_memory.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <mutex>
#include <sstream>

namespace nmexport::cuda {
namespace {

//! Most tokens that the decode kernel is given where nothing was measured.
constexpr int32_t kBREAK_EVEN_TOKENS = 2;

PlanTable compiledTable() {
    return {
#include "plans_h100.inl"
    };
}

std::shared_ptr<PlanTable const>& currentTable() {
    static std::shared_ptr<PlanTable const> table =
        std::make_shared<PlanTable const>(compiledTable());
    return table;
}

std::mutex& tableMutex() {
    static std::mutex mutex;
    return mutex;
}

int32_t ceilDivide(int32_t a, int32_t b) {
    return (a + b - 1) / b;
}

constexpr int kPLAN_FIELDS = 8;
constexpr int kFIELDS = 7 + kPLAN_FIELDS + 3;

//! Rows of few tokens carry plans by rule, whose unroll follows the token count.
bool isLaunchable(DecodePlan const& p, int32_t tokens) {
    bool const isTuned = std::any_of(
        std::begin(kTUNED_SHAPES), std::end(kTUNED_SHAPES), [&](TunedShape const& shape) {
            return shape.lanesPerRow == p.lanesPerRow && shape.vectors == p.vectors &&
                   shape.warps == p.warps && shape.unroll == p.unroll;
        });
    bool const isByRule = (p.lanesPerRow == 8 || p.lanesPerRow == 16 || p.lanesPerRow == 32) &&
                          p.vectors == 1 && p.warps == 8;
    return p.cluster >= 1 && p.cluster <= 8 && (isTuned || (tokens > 1 && isByRule));
}

bool parseRow(std::string line, PlanRow* row) {
    std::replace_if(
        line.begin(), line.end(),
        [](char c) { return c == '{' || c == '}' || c == ',' || c == 'F'; }, ' ');
    std::istringstream fields(line);
    double v[kFIELDS];
    for (double& value : v) {
        if (!(fields >> value)) {
            return false;
        }
    }
    std::string rest;
    if (fields >> rest) {
        return false;
    }
    auto const whole = [&](int i) { return static_cast<int32_t>(v[i]); };
    *row = {whole(0),
            whole(1),
            whole(2),
            whole(3),
            whole(4),
            whole(5),
            whole(6),
            {whole(7), whole(8), whole(9), whole(10), whole(11), whole(12), whole(13), whole(14)},
            static_cast<float>(v[15]),
            static_cast<float>(v[16]),
            static_cast<float>(v[17])};
    return row->channels > 0 && row->outputs > 0 && row->tokens > 0 &&
           (isLaunchable(row->plan, row->tokens) || row->elementBytes == 4);
}

//! Whether a lone CTA of the widest shape that several tokens run with fits the chip.
bool fits(DeviceTraits const& device, DType type, int32_t tokens) {
    DecodePlan widest{};
    widest.lanesPerRow = 32;
    return fittingCluster(footprintOf(widest, type, tokens), 1, device.sharedBytesPerBlock) == 1;
}

//! How far two sizes are apart, as the logarithm of their quotient.
double distance(int32_t a, int32_t b) {
    return std::fabs(std::log(static_cast<double>(a) / b));
}

}  // namespace

int parsePlanTable(std::string const& text, PlanTable* table) {
    PlanTable rows;
    std::istringstream lines(text);
    std::string line;
    for (int number = 1; std::getline(lines, line); ++number) {
        size_t const first = line.find_first_not_of(" \t\r");
        if (first == std::string::npos || line.compare(first, 2, "//") == 0) {
            continue;
        }
        PlanRow row{};
        if (!parseRow(line, &row)) {
            return number;
        }
        rows.push_back(row);
    }
    *table = std::move(rows);
    return 0;
}

std::shared_ptr<PlanTable const> activePlanTable() {
    std::lock_guard<std::mutex> const lock(tableMutex());
    return currentTable();
}

void usePlanTable(PlanTable table) {
    PlanTable const compiled = compiledTable();
    table.insert(table.end(), compiled.begin(), compiled.end());
    std::lock_guard<std::mutex> const lock(tableMutex());
    currentTable() = std::make_shared<PlanTable const>(std::move(table));
}

namespace {

PlanRow const* findRow(PlanTable const& table, DeviceTraits const& device,
                       PlanRequest const& request) {
    int32_t const elementBytes = request.type == DType::kFLOAT32 ? 4 : 2;
    double const limit = std::log(1.5);
    PlanRow const* best = nullptr;
    double nearest = 0;
    for (PlanRow const& row : table) {
        bool const isThisChip =
            row.computeCapability == device.computeCapability &&
            std::abs(row.multiprocessors - device.multiprocessors) * 10 <= device.multiprocessors;
        bool const isThisTask = row.elementBytes == elementBytes && row.tokens == request.tokens &&
                                (row.grouped != 0) == request.isGrouped;
        if (!isThisChip || !isThisTask) {
            continue;  // before the logarithms: this runs at every launch
        }
        double const k = distance(row.channels, request.channels);
        double const o = distance(row.outputs, request.outputs);
        if (std::max(k, o) <= limit && (best == nullptr || k + o < nearest)) {
            best = &row;
            nearest = k + o;
        }
    }
    return best;
}

}  // namespace

PlanRow const* findPlan(PlanTable const& table, DeviceTraits const& device,
                        PlanRequest const& request) {
    PlanRow const* const row = findRow(table, device, request);
    if (row != nullptr || !request.isGrouped) {
        return row;
    }
    PlanRequest plain = request;
    plain.isGrouped = false;
    return findRow(table, device, plain);
}

DecodePlan planByRule(DeviceTraits const& device, PlanRequest const& request) {
    int32_t const vector = request.type == DType::kFLOAT32 ? 4 : 8;
    int32_t const multiprocessors = std::max(device.multiprocessors, 1);
    int32_t const splits = device.computeCapability >= 90 ? 8 : 1;
    DecodePlan plan{};
    plan.unroll = request.tokens > 2 ? 4 : 8;
    plan.overlap = 1;
    plan.residentWarps = 24;
    plan.warps = 8;
    // The widest row segment whose tiles, split over K as far as a cluster goes, still occupy most
    // multiprocessors.
    for (int32_t lanes : {32, 16, 8}) {
        plan.lanesPerRow = lanes;
        if (ceilDivide(request.outputs, lanes * vector) * splits * 3 >= multiprocessors * 2) {
            break;
        }
    }
    // Up to three CTAs per multiprocessor, all resident at once; a warp should have 32 channels at
    // least.
    int32_t const tiles = ceilDivide(request.outputs, plan.lanesPerRow * vector);
    int32_t const useful = std::max(request.channels / (plan.warps * 32), 1);
    plan.cluster = std::max(1, std::min({splits, useful, multiprocessors * 8 / 3 / tiles}));
    return plan;
}

DecodePlan decodePlan(DeviceTraits const& device, DType type, int32_t tokens, int32_t channels,
                      int32_t outputs, bool isGrouped) {
    PlanRequest const request{type, tokens, channels, outputs, isGrouped};
    std::shared_ptr<PlanTable const> const table = activePlanTable();
    PlanRow const* const row = findPlan(*table, device, request);
    DecodePlan plan = row == nullptr ? planByRule(device, request) : row->plan;
    plan.cluster =
        fittingCluster(footprintOf(plan, type, tokens), plan.cluster, device.sharedBytesPerBlock);
    return plan;
}

bool decodeIsFaster(DeviceTraits const& device, DType type, int32_t tokens, int32_t channels,
                    int32_t outputs) {
    if (tokens < 1 || tokens > kMAX_DECODE_TOKENS || !fits(device, type, tokens)) {
        return false;
    }
    std::shared_ptr<PlanTable const> const table = activePlanTable();
    PlanRow const* const row = findPlan(*table, device, {type, tokens, channels, outputs, false});
    return row == nullptr ? tokens <= kBREAK_EVEN_TOKENS : row->sparseUs <= row->maskedUs;
}

int setPlanTable(char const* text) {
    PlanTable table;
    int const fault = parsePlanTable(text, &table);
    if (fault == 0) {
        usePlanTable(std::move(table));
    }
    return fault;
}

}  // namespace nmexport::cuda
