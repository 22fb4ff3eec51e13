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

// The zero points of a step, a lane an output, in excess like the weights.
template <IntegerFormat kFORMAT, bool kPARTIAL>
inline void zeroPoints(const std::uint8_t* from, std::size_t count, Simd::I* zeros) {
    const Simd::I row = loadBytes<kFORMAT, kPARTIAL>(from, count);
    const Simd::I rows[4] = {row, row, row, row};
    quadsOf<kFORMAT>(rows, zeros);
    for (int v = 0; v < vectorsOf(kFORMAT); ++v) zeros[v] = Dot::firstBytes(zeros[v]);
}

// A step's scales in the order of the sums; past the last column they do not matter.
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

// What integer sums begin with: it takes the weights' excess away again.
template <IntegerFormat kFORMAT>
inline std::int32_t startOf(bool hasZeros, std::int32_t total) {
    // Zero points are in excess as well, so that the two cancel.
    return hasZeros
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
template <IntegerFormat kFORMAT, typename S, Cache kCACHE>
inline __attribute__((always_inline)) void askScales(const IntegerWeights& weights,
                                                     std::size_t group, std::size_t step) {
    const S* from = static_cast<const S*>(weights.scale) + group * weights.scaleStride +
                    step * stepColumns(kFORMAT);
    constexpr std::size_t kBYTES = stepColumns(kFORMAT) * sizeof(S);
    const char* bytes = reinterpret_cast<const char*>(from);
    for (std::size_t at = 0; at < kBYTES; at += kLINE) ask<kCACHE>(bytes + at);
    ask<kCACHE>(bytes + kBYTES - 1);
    if (weights.zero != nullptr) {
        ask<kCACHE>(weights.zero + group * weights.rowBytes + step * kSTEP_BYTES);
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
