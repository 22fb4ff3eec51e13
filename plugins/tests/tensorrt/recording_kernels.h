// Stand-ins for the CUDA kernels and the product: they note what they were asked for.
#pragma once

#include <string>
#include <vector>

#include "dense_product.h"
#include "nm_cuda.h"
#include "stored.h"

namespace nmexport::test {

struct Launches {
    std::vector<std::string>
        order;  // "mask", "product", "epilogue", "decode", "prepare", "stored", "widen"
    std::vector<cuda::MaskArgs> masks;
    std::vector<cuda::LinearArgs> decodes;
    std::vector<cuda::EpilogueArgs> epilogues;
    std::vector<cuda::WidenArgs> tiles;
    std::vector<cuda::ProductShape> products;
    void* productResult{nullptr};
    void* productWorkspace{nullptr};
    cuda::DeviceTraits device{89, 128, 99 << 10};
    cudaError_t next{cudaSuccess};  // what the next launch returns
    bool noProduct{false};          // cuBLASLt is missing
};

Launches& launches();

}  // namespace nmexport::test
