// The compiled decode shapes of one element type.
#pragma once

#include "decode_dispatch.cuh"
#include "decode_kernel.cuh"

namespace nmexport::cuda {

//! What the selection asks of a kernel.
template <typename T_, int TOKENS_, Ranking RANKING_, bool MOMENTS_>
struct DecodeTask {
    using T = T_;
    static constexpr int TOKENS = TOKENS_;
    static constexpr Ranking RANKING = RANKING_;
    static constexpr bool MOMENTS = MOMENTS_;
    //! One token on rows of 16-bit elements in groups of 16: every shape that a plan table names is
    //! compiled.
    static constexpr bool IS_TUNED =
        TOKENS == 1 && sizeof(T) == 2 && RANKING != Ranking::kANY && !MOMENTS;
};

template <typename Task, int LANES, int VECTORS, int WARPS, int UNROLL, int MIN_CTAS,
          bool ALIGNED = true>
cudaError_t launchCompiled(LinearArgs const& args, DecodePlan const& plan,
                           DeviceTraits const& device, cudaStream_t stream) {
    using Shape = DecodeShape<typename Task::T, Task::TOKENS, Task::RANKING, LANES, VECTORS, WARPS,
                              UNROLL, true, Task::MOMENTS, ALIGNED>;
    return launchDecodeShape<Shape, MIN_CTAS>(args, plan, device, stream);
}

//! A digit for each of lanes / 8, vectors, warps / 4, unroll / 4.
constexpr int shapeCode(DecodePlan const& plan) {
    return plan.lanesPerRow / 8 * 1000 + plan.vectors * 100 + plan.warps / 4 * 10 + plan.unroll / 4;
}

//! The shapes that were ever fastest on a measured chip; the last number is how many CTAs per
//! multiprocessor the registers must leave room for.
template <typename Task>
cudaError_t launchTuned(LinearArgs const& args, DecodePlan const& plan, DeviceTraits const& device,
                        cudaStream_t stream) {
    switch (shapeCode(plan)) {
        case 1122:
            return launchCompiled<Task, 8, 1, 8, 8, 3>(args, plan, device, stream);
        case 1142:
            return launchCompiled<Task, 8, 1, 16, 8, 1>(args, plan, device, stream);
        case 2111:
            return launchCompiled<Task, 16, 1, 4, 4, 8>(args, plan, device, stream);
        case 2122:
            return launchCompiled<Task, 16, 1, 8, 8, 3>(args, plan, device, stream);
        case 2142:
            return launchCompiled<Task, 16, 1, 16, 8, 1>(args, plan, device, stream);
        case 4121:
            return launchCompiled<Task, 32, 1, 8, 4, 4>(args, plan, device, stream);
        case 4122:
            return launchCompiled<Task, 32, 1, 8, 8, 2>(args, plan, device, stream);
        case 4124:
            return launchCompiled<Task, 32, 1, 8, 16, 2>(args, plan, device, stream);
        case 4142:
            return launchCompiled<Task, 32, 1, 16, 8, 1>(args, plan, device, stream);
        default:
            return cudaErrorInvalidValue;
    }
}

template <typename Task>
cudaError_t launchGeneral(LinearArgs const& args, DecodePlan const& plan,
                          DeviceTraits const& device, cudaStream_t stream) {
    constexpr int kUNROLL = Task::TOKENS > 2 ? 4 : 8;
    // The else keeps the compiler from making two more shapes of every kernel with moments, which
    // nothing launches.
    if constexpr (Task::MOMENTS) {
        return launchCompiled<Task, 16, 1, 8, kUNROLL, 1>(args, plan, device, stream);
    } else {
        switch (plan.lanesPerRow) {
            case 8:
                return launchCompiled<Task, 8, 1, 8, kUNROLL, 1>(args, plan, device, stream);
            case 16:
                return launchCompiled<Task, 16, 1, 8, kUNROLL, 1>(args, plan, device, stream);
            case 32:
                return launchCompiled<Task, 32, 1, 8, kUNROLL, 1>(args, plan, device, stream);
            default:
                return cudaErrorInvalidValue;
        }
    }
}

template <typename T, int TOKENS, Ranking RANKING>
cudaError_t launchRanking(LinearArgs const& args, DecodePlan const& plan,
                          DeviceTraits const& device, cudaStream_t stream) {
    if constexpr (RANKING != Ranking::kNONE) {
        if (args.selection.varianceCorrection) {
            return launchGeneral<DecodeTask<T, TOKENS, RANKING, true>>(args, plan, device, stream);
        }
    }
    using Task = DecodeTask<T, TOKENS, RANKING, false>;
    if constexpr (Task::IS_TUNED) {
        return launchTuned<Task>(args, plan, device, stream);
    } else {
        return launchGeneral<Task>(args, plan, device, stream);
    }
}

template <typename T, int TOKENS>
cudaError_t launchTokens(LinearArgs const& args, DecodePlan const& plan, DeviceTraits const& device,
                         cudaStream_t stream) {
    if (!hasAlignedRows(args)) {
        using Task = DecodeTask<T, TOKENS, Ranking::kANY, true>;
        return launchCompiled<Task, 16, 1, 8, 4, 1, false>(args, plan, device, stream);
    }
    if constexpr (sizeof(T) == 2 && TOKENS == 1) {
        if (args.isPruned) {
            return launchRanking<T, TOKENS, Ranking::kNONE>(args, plan, device, stream);
        }
    }
    if (args.selection.m != 16) {
        return launchRanking<T, TOKENS, Ranking::kANY>(args, plan, device, stream);
    }
    if constexpr (sizeof(T) == 2) {
        if (isBareMagnitude(args)) {
            return launchRanking<T, TOKENS, Ranking::kPACKED>(args, plan, device, stream);
        }
    }
    return launchRanking<T, TOKENS, Ranking::kWIDE>(args, plan, device, stream);
}

template <typename T>
cudaError_t launchDecodeOf(LinearArgs const& args, DecodePlan const& plan,
                           DeviceTraits const& device, cudaStream_t stream) {
    switch (args.isPruned ? 1 : args.tokens) {
        case 1:
            return launchTokens<T, 1>(args, plan, device, stream);
        case 2:
            return launchTokens<T, 2>(args, plan, device, stream);
        case 3:
            return launchTokens<T, 3>(args, plan, device, stream);
        case 4:
            return launchTokens<T, 4>(args, plan, device, stream);
        default:
            return cudaErrorInvalidValue;
    }
}

}  // namespace nmexport::cuda
