// What tests of the CPU kernels need beside checks: variants, random values, equal bits.
#pragma once

#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "expect.h"
#include "variant.h"

namespace nmexport::test {

// Every variant that this processor can run.
inline std::vector<const Variant*> variants() {
    std::vector<const Variant*> found{&portableVariant()};
    for (const Variant* variant : {avx2Variant(), avx512Variant(), neonVariant()}) {
        if (variant != nullptr) found.push_back(variant);
    }
    return found;
}

inline std::vector<float> normals(std::mt19937& random, std::size_t count) {
    std::normal_distribution<float> normal;
    std::vector<float> values(count);
    for (float& value : values) value = normal(random);
    return values;
}

template <typename T>
bool sameBits(const std::vector<T>& a, const std::vector<T>& b) {
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

}  // namespace nmexport::test
