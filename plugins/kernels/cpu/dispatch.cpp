// Which variant runs here.
#include <atomic>
#include <cstring>
#include <initializer_list>

#include "dots.h"
#include "processor.h"
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

const Variant* fastest() {
    for (const Variant* variant : {avx512Variant(), avx2Variant(), neonVariant()}) {
        if (variant != nullptr) return variant;
    }
    return &portableVariant();
}

// Elsewhere more lines can be on their way to the second level than to the first. On Intel's cores
// that gains nothing, and what lies there takes longer to load (both measured).
std::atomic<Cache>& ahead() {
    static std::atomic<Cache> cache{processor().intel ? Cache::kFIRST_LEVEL : Cache::kSECOND_LEVEL};
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
    return processor().avx2 ? avx2Table() : nullptr;
}
const Variant* avx512Variant() {
    return processor().avx512 ? avx512Table() : nullptr;
}
const Variant* neonVariant() {
    return neonTable();
}

const DotKernels* avx2Dots() {
    return processor().avx2 ? avx2DotsTable() : nullptr;
}
const DotKernels* avxVnniDots() {
    return processor().avxVnni ? avxVnniDotsTable() : nullptr;
}
const DotKernels* avx512VnniDots() {
    return processor().avx512Vnni ? avx512VnniDotsTable() : nullptr;
}
const DotKernels* neonDots() {
    return neonDotsTable();
}
const DotKernels* neonDotProductDots() {
    return processor().dotProduct ? neonDotProductTable() : nullptr;
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
