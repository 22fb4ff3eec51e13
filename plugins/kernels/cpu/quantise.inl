// Values of 8 bits. Included by each instruction set.

namespace nmexport {
namespace {

constexpr std::size_t kCHUNK = 16;
using Floats = float __attribute__((vector_size(kCHUNK * sizeof(float))));
using Ints = std::int32_t __attribute__((vector_size(kCHUNK * sizeof(std::int32_t))));
using Bytes = std::int8_t __attribute__((vector_size(kCHUNK)));

// Values as bits, and zeros where they are not kept.
inline void keptBits(const float* values, const std::uint64_t* keep, std::size_t position,
                     Ints* bits) {
    constexpr Ints kBIT = {1 << 0, 1 << 1, 1 << 2,  1 << 3,  1 << 4,  1 << 5,  1 << 6,  1 << 7,
                           1 << 8, 1 << 9, 1 << 10, 1 << 11, 1 << 12, 1 << 13, 1 << 14, 1 << 15};
    std::memcpy(bits, values + position, sizeof *bits);
    if (keep == nullptr) return;
    const std::int32_t mask = static_cast<std::int32_t>(keep[position / 64] >> (position % 64));
    *bits &= (kBIT & mask) != 0;
}

// The largest magnitude as bits: those of positive floats order as integers do, NaN on top.
inline std::int32_t largestBits(const ValueBlock& block) {
    Ints most{};
    for (std::size_t k = block.first; k < block.first + block.count; k += kCHUNK) {
        Ints bits;
        keptBits(block.values, block.keep, k, &bits);
        bits &= 0x7fffffff;
        most = bits > most ? bits : most;
    }
    std::int32_t largest = 0;
    for (std::size_t i = 0; i < kCHUNK; ++i) largest = most[i] > largest ? most[i] : largest;
    return largest;
}

float quantise(const ValueBlock& block, std::int8_t* to, std::int32_t* total) {
    constexpr std::int32_t kINFINITY_BITS = 0x7f800000;
    // Adding it rounds to an integer, half to even, whose 8 bits are then the lowest of the sum.
    constexpr float kROUNDING = 12582912.0f;  // 1.5 * 2^23
    const std::int32_t bits = largestBits(block);
    *total = 0;
    if (bits == 0 || bits >= kINFINITY_BITS) {
        std::memset(to, 0, block.count);
        return bits == 0 ? 0.0f : floatOf(0x7fc00000u);
    }
    const float largest = floatOf(static_cast<std::uint32_t>(bits));
    // So that 127 times the largest is no infinity; what turns to zero thereby is one anyway.
    const float shrink = largest > 0x1p100f ? 0x1p-16f : 1.0f;
    Ints sums{};
    for (std::size_t k = 0; k < block.count; k += kCHUNK) {
        Ints kept;
        keptBits(block.values, block.keep, block.first + k, &kept);
        Floats value;
        std::memcpy(&value, &kept, sizeof value);
        const Floats rounded = value * shrink * 127.0f / (largest * shrink) + kROUNDING;
        Ints whole;
        std::memcpy(&whole, &rounded, sizeof whole);
        whole -= static_cast<std::int32_t>(0x4b400000);  // the bits of kROUNDING
        sums += whole;
        const Bytes bytes = __builtin_convertvector(whole, Bytes);
        std::memcpy(to + k, &bytes, sizeof bytes);
    }
    for (std::size_t i = 0; i < kCHUNK; ++i) *total += sums[i];
    return largest / 127.0f;
}

}  // namespace
}  // namespace nmexport
