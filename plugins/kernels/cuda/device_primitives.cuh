// The few PTX instructions that the kernels use, each a no-op or a plain equivalent where the
// target lacks it.
#pragma once

#include "element.cuh"

#include <cstdint>

namespace nmexport::cuda {

//! Lets the next kernel of the stream be scheduled now (programmatic dependent launch).
__device__ __forceinline__ void allowDependentLaunch() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

//! Waits until the kernels before this one have finished and their writes are visible.
__device__ __forceinline__ void waitForPredecessors() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

//! Lets a kernel have so much dynamic shared memory.
template <typename Kernel>
cudaError_t allowSharedBytes(Kernel* kernel, size_t bytes) {
    if (bytes <= size_t{48} << 10) {
        return cudaSuccess;  // what every kernel may have
    }
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                static_cast<int>(bytes));
}

//! 16 bytes of a weight row: read once, so kept out of L1.
__device__ __forceinline__ uint4 loadStreaming(void const* address) {
    uint4 value;
#if __CUDA_ARCH__ >= 800
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "l"(address));
#else
    asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "l"(address));
#endif
    return value;
}

//! The same, of 16 or of 8 bytes; those only where compute capability is 8.0 or more.
template <typename Vector>
__device__ __forceinline__ Vector loadStreaming(void const* address) {
    if constexpr (sizeof(Vector) == sizeof(uint4)) {
        return loadStreaming(address);
    } else {
        uint2 value{};
#if __CUDA_ARCH__ >= 800
        asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];"
                     : "=r"(value.x), "=r"(value.y)
                     : "l"(address));
#endif
        return value;
    }
}

__device__ __forceinline__ void prefetchToL2(void const* address) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

//! An activation: written by the kernel before, perhaps while this one was already resident, so
//! never through the non-coherent path and never from a stale L1 line.
__device__ __forceinline__ float loadActivation(float const* address) {
    float value;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(value) : "l"(address));
    return value;
}

//! 16 bytes of activations.
__device__ __forceinline__ uint4 loadActivationVector(void const* address) {
    uint4 raw;
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(raw.x), "=r"(raw.y), "=r"(raw.z), "=r"(raw.w)
                 : "l"(address));
    return raw;
}

//! The bits of one 16-bit activation.
template <typename T>
__device__ __forceinline__ uint32_t loadActivationBits(T const* address) {
    static_assert(sizeof(T) == 2);
    unsigned short bits;
    asm volatile("ld.global.cg.u16 %0, [%1];" : "=h"(bits) : "l"(address));
    return bits;
}

//! Two neighbouring 16-bit activations, the first in the low half.
template <typename T>
__device__ __forceinline__ uint32_t loadActivationWord(T const* address) {
    static_assert(sizeof(T) == 2);
    uint32_t word;
    asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(word) : "l"(address));
    return word;
}

template <typename T>
__device__ __forceinline__ float loadActivation(T const* address) {
    return toFloat<T>(wordHalf<T>(loadActivationBits(address)));
}

__device__ __forceinline__ uint32_t clusterSize() {
#if __CUDA_ARCH__ >= 900
    uint32_t size;
    asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(size));
    return size;
#else
    return 1;
#endif
}

__device__ __forceinline__ uint32_t clusterRank() {
#if __CUDA_ARCH__ >= 900
    uint32_t rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
#else
    return 0;
#endif
}

//! Makes rank 0's mailbox ready for the other CTAs of the cluster; every thread of every CTA,
//! before the first send. Costs no fence later: data and signal travel together. Only in a kernel
//! that was launched with clusters: elsewhere st.async is an illegal instruction.
__device__ __forceinline__ void openMailbox(uint64_t* mailbox, uint32_t rank) {
#if __CUDA_ARCH__ >= 900
    if (rank == 0 && threadIdx.x == 0) {
        uint32_t const address = static_cast<uint32_t>(__cvta_generic_to_shared(mailbox));
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address) : "memory");
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncwarp();  // the barrier below wants whole warps
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}

//! Waits until the mailbox of rank 0 is open.
__device__ __forceinline__ void waitForOpenMailbox() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

//! One thread of rank 0, after a barrier of its CTA: what all ranks together send. Some of it may
//! have come already.
__device__ __forceinline__ void expectMail(uint64_t* mailbox, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
    uint32_t const address = static_cast<uint32_t>(__cvta_generic_to_shared(mailbox));
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address), "r"(bytes)
                 : "memory");
#endif
}

//! Rank 0 waits until everything has been sent.
__device__ __forceinline__ void waitForMail(uint64_t* mailbox) {
#if __CUDA_ARCH__ >= 900
    uint32_t const address = static_cast<uint32_t>(__cvta_generic_to_shared(mailbox));
    uint32_t isThere = 0;
    while (isThere == 0) {
        asm volatile(
            "{\n"
            ".reg .pred done;\n"
            "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%1], 0;\n"
            "selp.u32 %0, 1, 0, done;\n"
            "}"
            : "=r"(isThere)
            : "r"(address)
            : "memory");
    }
#endif
}

//! Writes 8 bytes to rank 0's shared memory and counts them in its mailbox; `local` is this CTA's
//! copy of the target.
__device__ __forceinline__ void sendToRankZero(uint64_t* local, uint64_t value, uint64_t* mailbox) {
#if __CUDA_ARCH__ >= 900
    uint32_t target;
    uint32_t signal;
    asm("mapa.shared::cluster.u32 %0, %1, 0;"
        : "=r"(target)
        : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(local))));
    asm("mapa.shared::cluster.u32 %0, %1, 0;"
        : "=r"(signal)
        : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(mailbox))));
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.b64 [%0], %1, [%2];" ::"r"(target),
        "l"(value), "r"(signal)
        : "memory");
#else
    *local = value;
#endif
}

}  // namespace nmexport::cuda
