// The tile product of tensor cores.
#pragma once

#include "element.cuh"

#include <cstdint>

namespace nmexport::cuda {

//! sums [16, 8] += a [16, 16] * b [16, 8] over a warp, float32 sums of a 16-bit type; lanes hold
//! what PTX says of mma.m16n8k16. Nothing before compute capability 8.0.
template <typename T>
__device__ __forceinline__ void multiplyTiles(float (&sums)[4], uint32_t a0, uint32_t a1,
                                              uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
    if constexpr (sizeof(T) != 2) {
        return;
    } else if constexpr (kNAN_KEY<T> == kNAN_KEY<__half>) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    } else {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    }
#endif
}

}  // namespace nmexport::cuda
