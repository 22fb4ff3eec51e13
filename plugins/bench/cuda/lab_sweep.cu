// Decode shapes worth timing beside those of the product: bf16, one token, groups of 16, bare
// magnitude. Compiled once per row width: LAB_LANES and LAB_VECTORS.
#include "decode_kernel.cuh"

using namespace nmexport::cuda;

namespace {

template <int WARPS, int UNROLL, bool OVERLAP, int RESIDENT>
cudaError_t launchSwept(LinearArgs const& args, DecodePlan const& plan, cudaStream_t stream) {
    using Shape = DecodeShape<__nv_bfloat16, 1, Ranking::kPACKED, LAB_LANES, LAB_VECTORS, WARPS,
                              UNROLL, OVERLAP, false, true>;
    return launchDecodeShape<Shape, RESIDENT / WARPS>(args, plan, 90, stream);
}

//! The combinations of unroll, overlap and register budget that compile without spills.
template <int WARPS>
cudaError_t sweepUnroll(LinearArgs const& args, DecodePlan const& plan, cudaStream_t stream) {
    switch (plan.unroll * 1000 + plan.overlap * 100 + plan.residentWarps) {
        case 4132:
            return launchSwept<WARPS, 4, true, 32>(args, plan, stream);
        case 8124:
            return launchSwept<WARPS, 8, true, 24>(args, plan, stream);
        case 8116:
            return launchSwept<WARPS, 8, true, 16>(args, plan, stream);
        case 16116:
            return launchSwept<WARPS, 16, true, 16>(args, plan, stream);
        case 16016:
            return launchSwept<WARPS, 16, false, 16>(args, plan, stream);
        default:
            return cudaErrorInvalidValue;
    }
}

}  // namespace

#define LAB_JOINED(lanes, vectors) labSweep_##lanes##_##vectors
#define LAB_NAME(lanes, vectors) LAB_JOINED(lanes, vectors)

extern "C" int LAB_NAME(LAB_LANES, LAB_VECTORS)(LinearArgs const* args, DecodePlan const* plan,
                                                cudaStream_t stream) {
    switch (plan->warps) {
        case 4:
            return sweepUnroll<4>(*args, *plan, stream);
        case 8:
            return sweepUnroll<8>(*args, *plan, stream);
        case 16:
            return sweepUnroll<16>(*args, *plan, stream);
        default:
            return cudaErrorInvalidValue;
    }
}
