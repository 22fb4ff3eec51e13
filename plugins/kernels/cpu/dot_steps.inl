// Steps of integer products: bytes, quads, scales, and what is asked for ahead. Included by each
// instruction set after its Simd and its Dot.

namespace nmexport {
namespace {

constexpr std::size_t kSTEP_BYTES = Simd::kLANES * kQUAD;
// Cache lines asked for before their turn: what a core's share of the bandwidth holds in flight,
// and to spare (measured).
constexpr std::size_t kLINES_AHEAD = 192;
constexpr std::size_t kLINE = 64;

// Vectors that four rows become, and the columns they stand for.
constexpr int vectorsOf(IntegerFormat format) {
    return format == IntegerFormat::kINT8 ? 4 : 8;
}

constexpr std::size_t stepColumns(IntegerFormat format) {
    return static_cast<std::size_t>(vectorsOf(format)) * Simd::kLANES;
}

// What stored bits are xored with, so that they are numbers that a Dot takes; and by how much they
// then exceed the integers that they stand for.
constexpr std::uint8_t flipOf(IntegerFormat format) {
    if (format == IntegerFormat::kINT8) return Dot::kUNSIGNED ? 0x80 : 0;
    return format == IntegerFormat::kINT4 ? 0x88 : 0;
}

constexpr std::int32_t excessOf(IntegerFormat format) {
    if (format == IntegerFormat::kINT8) return Dot::kUNSIGNED ? 128 : 0;
    return format == IntegerFormat::kINT4 ? 8 : 0;
}

// Bytes of a row from an address on; past `count` zeros.
template <IntegerFormat kFORMAT, bool kPARTIAL>
inline __attribute__((always_inline)) Simd::I loadBytes(const std::uint8_t* from,
                                                        std::size_t count) {
    Simd::I bytes;
    if constexpr (kPARTIAL) {
        bytes = Dot::loadPartial(from, count);
    } else {
        bytes = Dot::load(from);
    }
    if constexpr (flipOf(kFORMAT) != 0) bytes = Dot::flip(bytes, flipOf(kFORMAT));
    return bytes;
}

// Four rows' bytes as quads: a lane an output.
template <IntegerFormat kFORMAT>
inline __attribute__((always_inline)) void quadsOf(const Simd::I* rows, Simd::I* quads) {
    Dot::interleave(rows, quads);
    if constexpr (kFORMAT != IntegerFormat::kINT8) {
        for (int v = 0; v < 4; ++v) {
            quads[4 + v] = Dot::highNibbles(quads[v]);
            quads[v] = Dot::lowNibbles(quads[v]);
        }
    }
}

// The integer zero points of a step, a lane an output, in excess like the weights.
template <IntegerFormat kFORMAT, bool kPARTIAL>
inline void zeroPoints(const std::uint8_t* from, std::size_t count, Simd::I* zeros) {
    const Simd::I row = loadBytes<kFORMAT, kPARTIAL>(from, count);
    const Simd::I rows[4] = {row, row, row, row};
    quadsOf<kFORMAT>(rows, zeros);
    for (int v = 0; v < vectorsOf(kFORMAT); ++v) zeros[v] = Dot::firstBytes(zeros[v]);
}

// A step's scales, or zero points in floating point, in the order of the sums; past the last column
// they do not matter.
template <IntegerFormat kFORMAT, typename S>
inline __attribute__((always_inline)) void scalesOf(const S* from, std::size_t columns,
                                                    Simd::F* scales) {
    constexpr std::size_t kLANES = Simd::kLANES;
    for (int v = 0; v < vectorsOf(kFORMAT); ++v) {
        const std::size_t at = static_cast<std::size_t>(v) * kLANES;
        if (at + kLANES <= columns) {
            scales[v] = Simd::load(from + at);
        } else if (at < columns) {
            scales[v] = Simd::loadPartial(from + at, static_cast<int>(columns - at));
        } else {
            scales[v] = Simd::broadcast(0.0f);
        }
    }
    Dot::shuffle<vectorsOf(kFORMAT)>(scales);
}

// What a token's block multiplies its integer sums with.
struct BlockFactors {
    Simd::F scale;
    Simd::F minusTotal;  // of its values; for zero points in floating point

    BlockFactors(float scale, std::int32_t total)
        : scale(Simd::broadcast(scale)), minusTotal(Simd::broadcast(-static_cast<float>(total))) {}
};

// A vector of sums with a block's integer sums added, as dots.h says. Without kSCALED the weights'
// scale does not matter, nor without floating point the zero point.
template <ZeroPoints kZEROS, bool kSCALED>
inline __attribute__((always_inline)) Simd::F plusBlock(Simd::F sum, Simd::I dot,
                                                        const BlockFactors& block,
                                                        Simd::F weightScale, Simd::F zero) {
    Simd::F whole = Dot::toFloat(dot);
    if constexpr (kZEROS == ZeroPoints::kMINIMA) {
        const Simd::F minimum = Simd::mul(zero, block.minusTotal);
        return Simd::fma(block.scale, Simd::fma(weightScale, whole, minimum), sum);
    }
    if constexpr (kZEROS == ZeroPoints::kFLOATS) {
        whole = Simd::fma(zero, block.minusTotal, whole);
    }
    return Simd::fma(kSCALED ? Simd::mul(block.scale, weightScale) : block.scale, whole, sum);
}

// Calls body with the zero points, and whether groups have scales, as constants.
template <ZeroPoints kZEROS, bool kSCALED>
struct Terms {
    static constexpr ZeroPoints kPOINTS = kZEROS;
    static constexpr bool kHAS_SCALES = kSCALED;
};

template <typename Body>
inline __attribute__((always_inline)) void withTerms(const IntegerWeights& weights,
                                                     const Body& body) {
    const bool scaled = weights.scale != nullptr;
    if (weights.zeroPoints == ZeroPoints::kMINIMA) return body(Terms<ZeroPoints::kMINIMA, true>{});
    if (weights.zeroPoints == ZeroPoints::kFLOATS) {
        if (scaled) return body(Terms<ZeroPoints::kFLOATS, true>{});
        return body(Terms<ZeroPoints::kFLOATS, false>{});
    }
    if (scaled) return body(Terms<ZeroPoints::kNONE, true>{});
    return body(Terms<ZeroPoints::kNONE, false>{});
}

// A step's zero points in floating point, in the order of the sums.
template <IntegerFormat kFORMAT, ZeroPoints kZEROS>
inline __attribute__((always_inline)) void floatZeros(const IntegerWeights& weights,
                                                      std::size_t group, std::size_t column,
                                                      std::size_t columns, Simd::F* zeros) {
    using Z = std::conditional_t<kZEROS == ZeroPoints::kMINIMA, Float16, float>;
    const char* from = static_cast<const char*>(weights.zero) + group * weights.zeroBytes;
    scalesOf<kFORMAT>(reinterpret_cast<const Z*>(from) + column, columns, zeros);
}

// What integer sums begin with: it takes the weights' excess away again.
template <IntegerFormat kFORMAT>
inline std::int32_t startOf(ZeroPoints zeroPoints, std::int32_t total) {
    // Integer zero points are in excess as well, so that the two cancel.
    return zeroPoints == ZeroPoints::kINTEGERS
               ? 0
               : static_cast<std::int32_t>(0u - static_cast<std::uint32_t>(total) *
                                                    static_cast<std::uint32_t>(excessOf(kFORMAT)));
}

// A tile cut into steps.
struct Steps {
    std::size_t count;  // the last one included
    std::size_t last;   // bytes of the last one

    explicit Steps(std::size_t bytes)
        : count((bytes + kSTEP_BYTES - 1) / kSTEP_BYTES), last(bytes - (count - 1) * kSTEP_BYTES) {}

    std::size_t bytesOf(std::size_t step) const { return step + 1 < count ? kSTEP_BYTES : last; }
};

template <Cache kCACHE>
inline __attribute__((always_inline)) void ask(const void* address) {
    if constexpr (kCACHE == Cache::kFIRST_LEVEL) {
        Simd::prefetch(address);
    } else {
        Simd::prefetchFar(address);
    }
}

template <Cache kCACHE>
inline __attribute__((always_inline)) void askRun(const void* from, std::size_t bytes) {
    const char* first = static_cast<const char*>(from);
    for (std::size_t at = 0; at < bytes; at += kLINE) ask<kCACHE>(first + at);
    ask<kCACHE>(first + bytes - 1);
}

// Asks for the scales and zero points of a step.
template <IntegerFormat kFORMAT, typename S, Cache kCACHE>
inline __attribute__((always_inline)) void askScales(const IntegerWeights& weights,
                                                     std::size_t group, std::size_t step) {
    const S* from = static_cast<const S*>(weights.scale) + group * weights.scaleStride +
                    step * stepColumns(kFORMAT);
    askRun<kCACHE>(from, stepColumns(kFORMAT) * sizeof(S));
    if (weights.zero == nullptr) return;
    const char* zeros = static_cast<const char*>(weights.zero) + group * weights.zeroBytes;
    switch (weights.zeroPoints) {
        case ZeroPoints::kINTEGERS:
            return ask<kCACHE>(zeros + step * kSTEP_BYTES);
        case ZeroPoints::kFLOATS:
            return askRun<kCACHE>(zeros + step * stepColumns(kFORMAT) * sizeof(float),
                                  stepColumns(kFORMAT) * sizeof(float));
        default:
            return askRun<kCACHE>(zeros + step * stepColumns(kFORMAT) * sizeof(Float16),
                                  stepColumns(kFORMAT) * sizeof(Float16));
    }
}

// Where it is asked for next: step after step, block after block.
struct Place {
    std::size_t block = 0;
    std::size_t step = 0;
    std::size_t group = 0;
    std::size_t groupBlock = 0;  // of the group

    // The first block of a group, where groups have scales.
    bool isNewGroup(const IntegerWeights& weights) const {
        return weights.scale != nullptr && groupBlock == 0;
    }

    void advance(std::size_t steps, const IntegerWeights& weights) {
        if (++step < steps) return;
        step = 0;
        ++block;
        if (++groupBlock == weights.groupBlocks) {
            groupBlock = 0;
            ++group;
        }
    }
};

template <IntegerFormat kFORMAT>
void restoreOrder(float* sums, std::size_t count) {
    constexpr int kVECTORS = vectorsOf(kFORMAT);
    for (std::size_t at = 0; at < count; at += stepColumns(kFORMAT)) {
        Simd::F v[kVECTORS];
        for (int i = 0; i < kVECTORS; ++i) v[i] = Simd::load(sums + at + i * Simd::kLANES);
        Dot::unshuffle<kVECTORS>(v);
        for (int i = 0; i < kVECTORS; ++i) Simd::store(sums + at + i * Simd::kLANES, v[i]);
    }
}

}  // namespace
}  // namespace nmexport
