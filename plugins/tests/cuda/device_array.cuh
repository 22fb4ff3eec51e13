// Device memory of a test on a GPU.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace nmexport::cuda {

#define CHECK_CUDA(call)                                                 \
    do {                                                                 \
        cudaError_t const outcome = (call);                              \
        if (outcome != cudaSuccess) {                                    \
            std::printf("%s: %s\n", #call, cudaGetErrorString(outcome)); \
            std::exit(EXIT_FAILURE);                                     \
        }                                                                \
    } while (false)

//! Device memory that starts as NaN bytes, so that an unwritten element shows.
template <typename T>
struct DeviceArray {
    explicit DeviceArray(size_t count) : count{count} {
        CHECK_CUDA(cudaMalloc(&data, std::max<size_t>(count, 1) * sizeof(T)));
        CHECK_CUDA(cudaMemset(data, 0xff, std::max<size_t>(count, 1) * sizeof(T)));
    }

    explicit DeviceArray(std::vector<T> const& host) : DeviceArray(host.size()) {
        CHECK_CUDA(cudaMemcpy(data, host.data(), count * sizeof(T), cudaMemcpyHostToDevice));
    }

    DeviceArray(DeviceArray const&) = delete;
    DeviceArray& operator=(DeviceArray const&) = delete;

    ~DeviceArray() { cudaFree(data); }

    std::vector<T> read() const {
        std::vector<T> host(count);
        CHECK_CUDA(cudaMemcpy(host.data(), data, count * sizeof(T), cudaMemcpyDeviceToHost));
        return host;
    }

    size_t count;
    T* data{nullptr};
};

}  // namespace nmexport::cuda
