// The least a test needs: check, report, exit code.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "variant.h"

namespace nmexport::test {

inline int& failures() {
    static int count = 0;
    return count;
}

inline void expect(bool condition, const char* what, const char* file, int line) {
    if (condition) return;
    if (++failures() <= 20) std::fprintf(stderr, "%s:%d: %s\n", file, line, what);
}

#define EXPECT(condition) ::nmexport::test::expect((condition), #condition, __FILE__, __LINE__)

inline int report(const char* name) {
    std::printf("%s: %d failures\n", name, failures());
    return failures() == 0 ? 0 : 1;
}

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
