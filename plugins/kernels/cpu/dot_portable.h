// Products of bytes in plain C++, beside simd_portable.h: the reference that the others must equal.
#pragma once

#include "dots.h"
#include "simd_portable.h"

namespace nmexport {
namespace {

struct Dot {
    static constexpr bool kUNSIGNED = false;
    static constexpr bool kTAKES_BYTES = false;  // as a nibble and another: bytes are signed
    static constexpr int kLANES = Simd::kLANES;
    static constexpr int kBYTES = 4 * kLANES;
    using I = Simd::I;
    using F = Simd::F;
    struct Word {
        std::int8_t value[4];
    };

    static I load(const void* from) {
        I out;
        std::memcpy(out.lane, from, kBYTES);
        return out;
    }
    static I loadPartial(const void* from, std::size_t count) {
        I out{};
        std::memcpy(out.lane, from, count);
        return out;
    }
    static void store(void* to, I value) { std::memcpy(to, value.lane, kBYTES); }
    static I flip(I bytes, std::uint8_t bits) {
        return each(bytes, [bits](std::uint8_t byte) { return byte ^ bits; });
    }
    static void interleave(const I* row, I* out) {
        for (int r = 0; r < 4; ++r) {
            std::uint8_t bytes[kBYTES];
            std::memcpy(bytes, row[r].lane, kBYTES);
            for (int i = 0; i < kBYTES; ++i) {
                std::uint8_t* lane = reinterpret_cast<std::uint8_t*>(out[i / kLANES].lane);
                lane[4 * (i % kLANES) + r] = bytes[i];
            }
        }
    }
    static I lowNibbles(I bytes) {
        return each(bytes, [](std::uint8_t byte) { return byte & 0x0f; });
    }
    static I highNibbles(I bytes) {
        return each(bytes, [](std::uint8_t byte) { return byte >> 4; });
    }
    static I firstBytes(I lanes) {
        I out;
        for (int i = 0; i < kLANES; ++i) {
            std::int8_t byte;
            std::memcpy(&byte, reinterpret_cast<const char*>(lanes.lane + i), 1);
            out.lane[i] = byte;
        }
        return out;
    }
    static Word word(std::int32_t four) {
        Word out;
        std::memcpy(out.value, &four, sizeof four);
        return out;
    }
    template <IntegerFormat>
    static I add(I sum, I weights, Word values) {
        std::int8_t bytes[kBYTES];
        std::memcpy(bytes, weights.lane, kBYTES);
        for (int i = 0; i < kLANES; ++i) {
            for (int r = 0; r < 4; ++r) sum.lane[i] += bytes[4 * i + r] * values.value[r];
        }
        return sum;
    }
    static I subtractProduct(I sum, I a, I b) {
        for (int i = 0; i < kLANES; ++i) sum.lane[i] -= a.lane[i] * b.lane[i];
        return sum;
    }
    static F toFloat(I value) {
        F out;
        for (int i = 0; i < kLANES; ++i) out.lane[i] = static_cast<float>(value.lane[i]);
        return out;
    }

    // From the order of columns to that of interleaved sums: nibbles' even columns come first.
    template <int kVECTORS>
    static void shuffle(F* v) {
        if constexpr (kVECTORS == 8) {
            F from[8];
            std::memcpy(from, v, sizeof from);
            for (int c = 0; c < 8 * kLANES; ++c) {
                const int to = c / 2 + c % 2 * 4 * kLANES;
                v[to / kLANES].lane[to % kLANES] = from[c / kLANES].lane[c % kLANES];
            }
        }
    }
    // And back.
    template <int kVECTORS>
    static void unshuffle(F* v) {
        if constexpr (kVECTORS == 8) {
            F from[8];
            std::memcpy(from, v, sizeof from);
            for (int c = 0; c < 8 * kLANES; ++c) {
                const int at = c / 2 + c % 2 * 4 * kLANES;
                v[c / kLANES].lane[c % kLANES] = from[at / kLANES].lane[at % kLANES];
            }
        }
    }

  private:
    template <typename Change>
    static I each(I bytes, const Change& change) {
        std::uint8_t byte[kBYTES];
        std::memcpy(byte, bytes.lane, kBYTES);
        for (std::uint8_t& one : byte) one = static_cast<std::uint8_t>(change(one));
        return load(byte);
    }
};

}  // namespace
}  // namespace nmexport
