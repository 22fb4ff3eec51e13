// What this processor can do, asked of itself. __builtin_cpu_supports says no to everything where a
// compiler's own library never fills its table (the Clang of zig.cmake), and kernels would be slow.
#pragma once

#if defined(__x86_64__)
#include <cpuid.h>

#include <cstring>
#endif
#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace nmexport {

struct Processor {
    bool avx2 = false;        // with FMA and F16C
    bool avx512 = false;      // F, BW, DQ and VL, with all of avx2
    bool avxVnni = false;     // with all of avx2
    bool avx512Vnni = false;  // with all of avx512
    bool dotProduct = false;  // of AArch64
    bool intel = false;
};

#if defined(__x86_64__)
inline Processor askProcessor() {
    Processor found;
    const auto bit = [](unsigned word, int place) { return (word >> place & 1u) != 0; };
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (__get_cpuid(0, &a, &b, &c, &d) == 0) return found;
    char vendor[12];
    std::memcpy(vendor, &b, 4);
    std::memcpy(vendor + 4, &d, 4);
    std::memcpy(vendor + 8, &c, 4);
    found.intel = std::memcmp(vendor, "GenuineIntel", sizeof vendor) == 0;
    if (__get_cpuid(1, &a, &b, &c, &d) == 0 || !bit(c, 27)) return found;
    const bool fma = bit(c, 12), avx = bit(c, 28), f16c = bit(c, 29);
    // Which registers the system saves when it switches threads: XCR0, which bit 27 says is there.
    unsigned saved = 0, upper = 0;
    __asm__ volatile("xgetbv" : "=a"(saved), "=d"(upper) : "c"(0));
    const bool savesYmm = (saved & 0x06u) == 0x06u, savesZmm = (saved & 0xe6u) == 0xe6u;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return found;
    found.avx2 = bit(b, 5) && avx && fma && f16c && savesYmm;
    found.avx512 = found.avx2 && bit(b, 16) && bit(b, 17) && bit(b, 30) && bit(b, 31) && savesZmm;
    found.avx512Vnni = found.avx512 && bit(c, 11);
    if (__get_cpuid_count(7, 1, &a, &b, &c, &d) != 0) found.avxVnni = found.avx2 && bit(a, 4);
    return found;
}
#elif defined(__aarch64__) && defined(__linux__)
inline Processor askProcessor() {
    Processor found;
    found.dotProduct = (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
    return found;
}
#else
inline Processor askProcessor() {
    Processor found;
#if defined(__aarch64__) && defined(__APPLE__)
    found.dotProduct = true;  // every 64-bit processor that runs macOS has it
#endif
    return found;
}
#endif

inline const Processor& processor() {
    static const Processor asked = askProcessor();
    return asked;
}

}  // namespace nmexport
