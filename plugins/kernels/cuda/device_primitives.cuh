// The few PTX instructions that the kernels use, each a no-op or a plain equivalent where the target lacks it.
#pragma once

#include "element.cuh"

#include <cstdint>

namespace nmexport::cuda
{

//! Lets the next kernel of the stream be scheduled now (programmatic dependent launch).
__device__ __forceinline__ void allowDependentLaunch()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

//! Waits until the kernels before this one have finished and their writes are visible.
__device__ __forceinline__ void waitForPredecessors()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

//! 16 bytes of a weight row: read once, so kept out of L1.
__device__ __forceinline__ uint4 loadStreaming(void const* address)
{
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

//! An activation: written by the kernel before, perhaps while this one was already resident, so never through the
//! non-coherent path and never from a stale L1 line.
__device__ __forceinline__ float loadActivation(float const* address)
{
    float value;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(value) : "l"(address));
    return value;
}

template <typename T>
__device__ __forceinline__ float loadActivation(T const* address)
{
    static_assert(sizeof(T) == 2);
    unsigned short bits;
    asm volatile("ld.global.cg.u16 %0, [%1];" : "=h"(bits) : "l"(address));
    T value;
    memcpy(&value, &bits, sizeof(value));
    return toFloat<T>(value);
}

__device__ __forceinline__ uint32_t clusterSize()
{
#if __CUDA_ARCH__ >= 900
    uint32_t size;
    asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(size));
    return size;
#else
    return 1;
#endif
}

__device__ __forceinline__ uint32_t clusterRank()
{
#if __CUDA_ARCH__ >= 900
    uint32_t rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
#else
    return 0;
#endif
}

__device__ __forceinline__ void arriveAtCluster()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void waitForCluster()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

//! Writes to the shared memory of another CTA of the cluster; `local` is this CTA's own copy of the target.
template <typename V>
__device__ __forceinline__ void storeToRank(V* local, uint32_t rank, V value)
{
#if __CUDA_ARCH__ >= 900
    uint32_t const address = static_cast<uint32_t>(__cvta_generic_to_shared(local));
    uint32_t remote;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
    if constexpr (sizeof(V) == 8)
    {
        asm volatile("st.shared::cluster.f64 [%0], %1;" ::"r"(remote), "d"(value) : "memory");
    }
    else
    {
        asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(remote), "f"(value) : "memory");
    }
#else
    *local = value;
#endif
}

} // namespace nmexport::cuda
