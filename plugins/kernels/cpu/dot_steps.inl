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

// The mask that stored bits are xored with, so that they are numbers that a Dot takes; and by how
// much they then exceed the integers that they stand for.
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

template <bool kIS_THERE, typename T>
inline __attribute__((always_inline)) Simd::F loadIf(const T* from) {
    if constexpr (kIS_THERE) return Simd::load(from);
    return Simd::broadcast(0.0f);
}

// The factors of a token's block for its integer sums.
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

// One step of a group: its scales and then, if there are any in floating point, its zero points.
template <IntegerFormat kFORMAT, typename S>
struct Record {
    const S* scales;
    const S* zeros;

    Record(const IntegerWeights& weights, std::size_t group, std::size_t step)
        : scales(reinterpret_cast<const S*>(weights.records + group * weights.groupBytes +
                                            step * weights.recordBytes)),
          zeros(scales + stepColumns(kFORMAT)) {}
};

// A product's scales and zero points, as compile-time constants.
template <ZeroPoints kZEROS, bool kSCALED>
struct Terms {
    static constexpr ZeroPoints kPOINTS = kZEROS;  // in floating point
    static constexpr bool kHAS_SCALES = kSCALED;
};

// S is what records hold; void: either type.
template <typename S, typename Body>
inline __attribute__((always_inline)) void withTerms(const IntegerWeights& weights,
                                                     const Body& body) {
    if (weights.records == nullptr) return body(Terms<ZeroPoints::kNONE, false>{});
    if constexpr (!std::is_same_v<S, float>) {
        if (weights.zeroPoints == ZeroPoints::kMINIMA) {
            return body(Terms<ZeroPoints::kMINIMA, true>{});
        }
    }
    if constexpr (!std::is_same_v<S, Float16>) {
        if (weights.zeroPoints == ZeroPoints::kFLOATS) {
            return body(Terms<ZeroPoints::kFLOATS, true>{});
        }
    }
    return body(Terms<ZeroPoints::kNONE, true>{});
}

// The start of integer sums: it takes the weights' excess away again.
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

// Asks for the scales and zero points of a step.
template <Cache kCACHE>
inline __attribute__((always_inline)) void askScales(const IntegerWeights& weights,
                                                     std::size_t group, std::size_t step) {
    const char* record = weights.records + group * weights.groupBytes + step * weights.recordBytes;
    for (std::size_t at = 0; at < weights.recordBytes; at += kLINE) ask<kCACHE>(record + at);
    if (weights.zeroPoints == ZeroPoints::kINTEGERS) {
        ask<kCACHE>(weights.zero + group * weights.rowBytes + step * kSTEP_BYTES);
    }
}

// The place that is asked for next: step after step, block after block.
struct Place {
    std::size_t block = 0;
    std::size_t step = 0;
    std::size_t group = 0;
    std::size_t groupBlock = 0;  // of the group

    // The first block of a group, where groups have scales.
    bool isNewGroup(const IntegerWeights& weights) const {
        return weights.records != nullptr && groupBlock == 0;
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
void arrange(float* values, std::size_t count) {
    constexpr int kVECTORS = vectorsOf(kFORMAT);
    for (std::size_t at = 0; at < count; at += stepColumns(kFORMAT)) {
        Simd::F v[kVECTORS];
        for (int i = 0; i < kVECTORS; ++i) v[i] = Simd::load(values + at + i * Simd::kLANES);
        Dot::shuffle<kVECTORS>(v);
        for (int i = 0; i < kVECTORS; ++i) Simd::store(values + at + i * Simd::kLANES, v[i]);
    }
}

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
