// Element types of tensors, and their conversion to and from float32 one value at a time.
//
// Everything here has internal linkage on purpose: this header is compiled once per instruction
// set, and a function with external linkage could be merged by the linker into the variant that
// the running processor does not have.
#pragma once

#include <cstdint>
#include <cstring>

namespace nmexport {

enum class ElementType { kFLOAT32 = 0, kFLOAT16 = 1, kBFLOAT16 = 2 };

constexpr int kELEMENT_TYPES = 3;
// The contents of W: values of X's type, or integers that stand for themselves less a zero point,
// times a scale.
enum class WeightType { kELEMENT, kINT8, kINT4, kUINT4 };
// The zero point: subtracted from the integers of W, or from their products with scales.
enum class ZeroPoints {
    kNONE,
    kINTEGERS,  // as W holds its own
    kFLOATS,    // float32: they may lie between the steps
    kMINIMA,    // float16: zero points times scales, which are float16 too
};
// Weights come in the element types, or as Int8: the last index of a table by weight type.
constexpr int kINT8_WEIGHTS = kELEMENT_TYPES;
constexpr int kWEIGHT_TYPES = kELEMENT_TYPES + 1;

// Bits of an IEEE binary16 / bfloat16 value; distinct types so that overloads can tell them apart.
struct Float16 {
    std::uint16_t bits;
};
struct BFloat16 {
    std::uint16_t bits;
};
// A quantised weight; what it stands for is this times its scale.
struct Int8 {
    std::int8_t value;
};

constexpr std::size_t elementBytes(ElementType type) {
    return type == ElementType::kFLOAT32 ? 4 : 2;
}

static inline std::uint32_t bitsOf(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float floatOf(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

static inline float toFloat(float value) {
    return value;
}

static inline float toFloat(Int8 value) {
    return static_cast<float>(value.value);
}

static inline float toFloat(BFloat16 value) {
    return floatOf(static_cast<std::uint32_t>(value.bits) << 16);
}

static inline float toFloat(Float16 value) {
    const std::uint32_t sign = static_cast<std::uint32_t>(value.bits & 0x8000u) << 16;
    const std::uint32_t exponent = (value.bits >> 10) & 0x1fu;
    const std::uint32_t fraction = value.bits & 0x3ffu;
    if (exponent == 0x1f) {
        // A signalling NaN turns quiet, as the hardware conversion does.
        const std::uint32_t quiet = fraction != 0 ? 0x400000u : 0;
        return floatOf(sign | 0x7f800000u | quiet | (fraction << 13));
    }
    if (exponent == 0) {
        const float magnitude = static_cast<float>(fraction) * 0x1p-24f;  // exact
        return floatOf(sign | bitsOf(magnitude));
    }
    return floatOf(sign | ((exponent + 112) << 23) | (fraction << 13));
}

static inline void fromFloat(float value, float* out) {
    *out = value;
}

// Round to nearest even; NaN stays NaN and turns quiet.
static inline void fromFloat(float value, BFloat16* out) {
    const std::uint32_t bits = bitsOf(value);
    const bool isNan = (bits & 0x7fffffffu) > 0x7f800000u;
    const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    out->bits = static_cast<std::uint16_t>(isNan ? (bits >> 16) | 0x40u : rounded);
}

static inline void fromFloat(float value, Float16* out) {
    const std::uint32_t bits = bitsOf(value);
    const std::uint32_t sign = (bits >> 16) & 0x8000u;
    const std::uint32_t magnitude = bits & 0x7fffffffu;
    std::uint32_t half;
    if (magnitude > 0x7f800000u) {
        half = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
    } else if (magnitude >= 0x477ff000u) {  // 65520 and up: rounds to infinity
        half = 0x7c00u;
    } else if (magnitude < 0x38800000u) {
        // Below 2^-14: adding 0.5 leaves the subnormal, rounded to nearest even, in the low bits.
        half = bitsOf(floatOf(magnitude) + 0.5f) - bitsOf(0.5f);
    } else {
        half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    }
    out->bits = static_cast<std::uint16_t>(sign | half);
}

}  // namespace nmexport
