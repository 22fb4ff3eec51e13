// Which variant runs here.
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <atomic>
#include <cstring>
#include <initializer_list>

#include "variant.h"

namespace nmexport {

// Null where the compiler does not target the architecture at all.
const Variant* avx2Table();
const Variant* avx512Table();
const Variant* neonTable();

namespace {

#if defined(__x86_64__)
// Older clang does not know "f16c" by name. What the system must save for it, it saves for AVX2.
bool hasF16c() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}
bool hasAvx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && hasF16c();
}
bool hasAvx512() {
    return hasAvx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool isIntel() {
    return __builtin_cpu_is("intel");
}
#else
bool hasAvx2() {
    return false;
}
bool hasAvx512() {
    return false;
}
bool isIntel() {
    return false;
}
#endif

const Variant* fastest() {
    for (const Variant* variant : {avx512Variant(), avx2Variant(), neonVariant()}) {
        if (variant != nullptr) return variant;
    }
    return &portableVariant();
}

// Elsewhere more lines can be on their way to the second level than to the first. On Intel's cores
// that gains nothing, and what lies there takes longer to load (both measured).
std::atomic<Cache>& ahead() {
    static std::atomic<Cache> cache{isIntel() ? Cache::kFIRST_LEVEL : Cache::kSECOND_LEVEL};
    return cache;
}

std::atomic<const Variant*>& active() {
    static std::atomic<const Variant*> variant{fastest()};
    return variant;
}

}  // namespace

const Variant* avx2Variant() {
    return hasAvx2() ? avx2Table() : nullptr;
}
const Variant* avx512Variant() {
    return hasAvx512() ? avx512Table() : nullptr;
}
const Variant* neonVariant() {
    return neonTable();
}

const Variant& activeVariant() {
    return *active().load(std::memory_order_relaxed);
}

Cache cacheAhead() {
    return ahead().load(std::memory_order_relaxed);
}

void useCacheAhead(Cache cache) {
    ahead().store(cache, std::memory_order_relaxed);
}

bool useVariant(const char* name) {
    for (const Variant* variant :
         {&portableVariant(), avx2Variant(), avx512Variant(), neonVariant()}) {
        if (variant != nullptr && std::strcmp(variant->name, name) == 0) {
            active().store(variant, std::memory_order_relaxed);
            return true;
        }
    }
    return false;
}

}  // namespace nmexport
