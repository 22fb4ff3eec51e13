// Which variant runs here.
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#include <atomic>
#include <cstring>
#include <initializer_list>

#include "dots.h"
#include "variant.h"

namespace nmexport {

// Null where the compiler does not target the architecture at all.
const Variant* avx2Table();
const Variant* avx512Table();
const Variant* neonTable();
const DotKernels* avx2DotsTable();
const DotKernels* avxVnniDotsTable();
const DotKernels* avx512VnniDotsTable();
const DotKernels* neonDotsTable();
const DotKernels* neonDotProductTable();

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
bool hasAvxVnni() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return hasAvx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a & 1u << 4) != 0;
}
bool hasAvx512Vnni() {
    return hasAvx512() && __builtin_cpu_supports("avx512vnni");
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
bool hasAvxVnni() {
    return false;
}
bool hasAvx512Vnni() {
    return false;
}
bool isIntel() {
    return false;
}
#endif

#if defined(__aarch64__) && defined(__linux__)
bool hasDotProduct() {
    return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
}
#else
// Every 64-bit processor of Apple's that runs macOS has it.
bool hasDotProduct() {
#if defined(__aarch64__) && defined(__APPLE__)
    return true;
#else
    return false;
#endif
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

// The fastest that go with a variant: those of the portable one are portable as well.
const DotKernels* fastestDots(const Variant& variant) {
    const auto is = [&](const char* name) { return std::strcmp(variant.name, name) == 0; };
    if (is("avx512")) {
        for (const DotKernels* dots : {avx512VnniDots(), avxVnniDots(), avx2Dots()}) {
            if (dots != nullptr) return dots;
        }
    }
    if (is("avx2")) return avxVnniDots() != nullptr ? avxVnniDots() : avx2Dots();
    if (is("neon")) return neonDotProductDots() != nullptr ? neonDotProductDots() : neonDots();
    return &portableDots();
}

std::atomic<const DotKernels*>& dots() {
    static std::atomic<const DotKernels*> kernels{fastestDots(*fastest())};
    return kernels;
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

const DotKernels* avx2Dots() {
    return hasAvx2() ? avx2DotsTable() : nullptr;
}
const DotKernels* avxVnniDots() {
    return hasAvxVnni() ? avxVnniDotsTable() : nullptr;
}
const DotKernels* avx512VnniDots() {
    return hasAvx512Vnni() ? avx512VnniDotsTable() : nullptr;
}
const DotKernels* neonDots() {
    return neonDotsTable();
}
const DotKernels* neonDotProductDots() {
    return hasDotProduct() ? neonDotProductTable() : nullptr;
}

const DotKernels& activeDots() {
    return *dots().load(std::memory_order_relaxed);
}

bool useDots(const char* name) {
    for (const DotKernels* kernels : {&portableDots(), avx2Dots(), avxVnniDots(), avx512VnniDots(),
                                      neonDots(), neonDotProductDots()}) {
        if (kernels != nullptr && std::strcmp(kernels->name, name) == 0) {
            dots().store(kernels, std::memory_order_relaxed);
            return true;
        }
    }
    return false;
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
            dots().store(fastestDots(*variant), std::memory_order_relaxed);
            return true;
        }
    }
    return false;
}

}  // namespace nmexport
