// Conversions: every 16-bit value survives, rounding is to nearest even, all variants agree.
#include <cmath>
#include <limits>

#include "check.h"

using namespace nmexport;
using namespace nmexport::test;

namespace {

template <typename T>
void everyValueSurvives() {
    for (std::uint32_t bits = 0; bits < 0x10000u; ++bits) {
        const T value{static_cast<std::uint16_t>(bits)};
        const float wide = toFloat(value);
        T back{0};
        fromFloat(wide, &back);
        EXPECT(std::isnan(wide) ? std::isnan(toFloat(back)) : back.bits == value.bits);
    }
}

// Rounding against the definition: the nearer neighbour, and of two equally near the even one.
template <typename T>
void roundsToNearestEven(float largestFinite) {
    std::mt19937 random(1);
    for (int i = 0; i < 300000; ++i) {
        const float value = floatOf(random());
        if (!(std::fabs(value) <= largestFinite)) continue;
        T rounded{0};
        fromFloat(value, &rounded);
        const double error = std::fabs(static_cast<double>(toFloat(rounded)) - value);
        for (int step : {-1, 1}) {
            const T neighbour{static_cast<std::uint16_t>(rounded.bits + step)};
            const float other = toFloat(neighbour);
            if (!std::isfinite(other)) continue;
            const double distance = std::fabs(static_cast<double>(other) - value);
            EXPECT(error < distance || (error == distance && (rounded.bits & 1) == 0));
        }
    }
}

template <typename T>
void variantsAgree(int type) {
    std::mt19937 random(2);
    std::vector<T> x(4096);
    std::vector<float> wide(4096);
    for (T& value : x) value.bits = static_cast<std::uint16_t>(random());
    for (float& value : wide) value = floatOf(random());
    std::vector<float> loaded(x.size()), expectedLoad(x.size());
    std::vector<T> stored(x.size()), expectedStore(x.size());
    for (std::size_t i = 0; i < x.size(); ++i) {
        expectedLoad[i] = toFloat(x[i]);
        fromFloat(wide[i] * 1.0f, &expectedStore[i]);
    }
    for (const Variant* variant : variants()) {
        for (std::size_t count : {std::size_t{4096}, std::size_t{4089}, std::size_t{3}}) {
            TokenInput token{x.data(), count, nullptr, nullptr, 0, false};
            variant->loadToken[type](token, loaded.data());
            EXPECT(std::memcmp(loaded.data(), expectedLoad.data(), count * 4) == 0);
            Epilogue epilogue{};
            epilogue.sums = wide.data();
            epilogue.columns = count;
            epilogue.factors = {1.0f, 0.0f};
            epilogue.y = stored.data();
            variant->epilogue[type](epilogue);
            EXPECT(std::memcmp(stored.data(), expectedStore.data(), count * 2) == 0);
        }
    }
}

}  // namespace

int main() {
    everyValueSurvives<Float16>();
    everyValueSurvives<BFloat16>();
    roundsToNearestEven<Float16>(65519.0f);
    roundsToNearestEven<BFloat16>(3.3e38f);
    variantsAgree<Float16>(1);
    variantsAgree<BFloat16>(2);
    return report("element");
}
