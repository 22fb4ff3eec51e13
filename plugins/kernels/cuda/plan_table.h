// Measured decode plans and break-even points: which kernel shape a linear runs with, and which
// path is faster.
#pragma once

#include "nm_cuda.h"

#include <memory>
#include <string>
#include <vector>

namespace nmexport::cuda {

//! One measurement: a shape and a token count on one chip. The fields' order is the column order of
//! the text form.
struct PlanRow {
    int32_t computeCapability;  //!< 10 * major + minor
    int32_t multiprocessors;
    int32_t elementBytes;  //!< of T: 2 or 4
    int32_t tokens;
    int32_t channels;  //!< K
    int32_t outputs;   //!< O
    int32_t grouped;   //!< 1 with a channel order: each warp gathers its part of x
    DecodePlan plan;   //!< the fastest
    float sparseUs;    //!< launchDecode with that plan
    float maskedUs;    //!< launchMask and a dense product: the other way to the same result
    float denseUs;     //!< the dense product alone, for the record
};

using PlanTable = std::vector<PlanRow>;

//! A compiled shape of the tuned kernels (one token, 16-bit, groups of 16); see launchTuned.
struct TunedShape {
    int32_t lanesPerRow;
    int32_t vectors;
    int32_t warps;
    int32_t unroll;
    int32_t residentWarps;
};

inline constexpr TunedShape kTUNED_SHAPES[] = {
    {8, 1, 8, 8, 24},  {8, 1, 16, 8, 16}, {16, 1, 4, 4, 32},  {16, 1, 8, 8, 24}, {16, 1, 16, 8, 16},
    {32, 1, 8, 4, 32}, {32, 1, 8, 8, 16}, {32, 1, 8, 16, 16}, {32, 1, 16, 8, 16}};

//! Reads rows of comma-separated numbers, as `nmexport bench cuda --table` writes them; lines that
//! start with `//` are comments, braces are ignored. On a fault returns its line number and leaves
//! `table` alone.
int parsePlanTable(std::string const& text, PlanTable* table);

//! The table in use: the one compiled in until another is set. Never null; safe to call from any
//! thread.
std::shared_ptr<PlanTable const> activePlanTable();

//! Uses another table from now on, in front of the compiled one. Changes speed alone.
void usePlanTable(PlanTable table);

//! What a plan is wanted for.
struct PlanRequest {
    DType type;
    int32_t tokens;
    int32_t channels;
    int32_t outputs;
    bool isGrouped;
};

//! The row measured on this chip (its capability and, within a tenth, its size) whose shape is
//! nearest, with neither side off by more than a half; null where there is none. With a channel
//! order, where nothing was measured with one, that without: kept rows lie the same way.
PlanRow const* findPlan(PlanTable const& table, DeviceTraits const& device,
                        PlanRequest const& request);

//! The plan for shapes and chips that nobody measured.
DecodePlan planByRule(DeviceTraits const& device, PlanRequest const& request);

}  // namespace nmexport::cuda
