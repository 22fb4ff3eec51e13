// One token: its shift, its statistics, its result. Included by each variant after its Simd.

namespace nmexport {
namespace {

// Partial sums of a float64 reduction. The order of additions is part of the result, so their
// number is the same in every variant, whatever its vectors hold.
constexpr std::size_t kPARTIALS = 16;

inline double total(const double* partial) {
    double sum = 0.0;
    for (std::size_t i = 0; i < kPARTIALS; ++i) sum += partial[i];
    return sum;
}

double mean(const float* values, std::size_t count) {
    double partial[kPARTIALS] = {};
    std::size_t k = 0;
    for (; k + kPARTIALS <= count; k += kPARTIALS) {
        for (std::size_t i = 0; i < kPARTIALS; ++i) {
            partial[i] += static_cast<double>(values[k + i]);
        }
    }
    for (std::size_t i = 0; k + i < count; ++i) {
        partial[i] += static_cast<double>(values[k + i]);
    }
    return total(partial) / static_cast<double>(count);
}

// Vectors that every instruction set has, in one register or several: the compiler splits them, and
// a lane's additions stay in order.
using Floats = float __attribute__((vector_size(kPARTIALS * sizeof(float))));
using Ints = std::int32_t __attribute__((vector_size(kPARTIALS * sizeof(std::int32_t))));
using Doubles = double __attribute__((vector_size(kPARTIALS * sizeof(double))));

struct Sums {
    Doubles offset{};        // of z - center
    Doubles offsetSquare{};  // of its squares
    Doubles kept{};          // of z where kept, else 0
    Doubles keptSquare{};    // of its squares, which float64 holds exactly
};

// Adds kPARTIALS values; bit i of `keep` says whether value i is kept.
inline void addMoments(const float* z, std::uint32_t keep, const Doubles& center, Sums* sums) {
    constexpr Ints kBIT = {1 << 0, 1 << 1, 1 << 2,  1 << 3,  1 << 4,  1 << 5,  1 << 6,  1 << 7,
                           1 << 8, 1 << 9, 1 << 10, 1 << 11, 1 << 12, 1 << 13, 1 << 14, 1 << 15};
    Ints bits;
    std::memcpy(&bits, z, sizeof bits);
    const Ints keptBits = bits & ((kBIT & static_cast<std::int32_t>(keep)) != 0);
    Floats value, keptValue;
    std::memcpy(&value, &bits, sizeof value);
    std::memcpy(&keptValue, &keptBits, sizeof keptValue);
    const Doubles offset = __builtin_convertvector(value, Doubles) - center;
    const Doubles kept = __builtin_convertvector(keptValue, Doubles);
    sums->offset += offset;
    sums->offsetSquare += offset * offset;
    sums->kept += kept;
    sums->keptSquare += kept * kept;
}

inline double total(const Doubles& partial) {
    double sum = 0.0;
    for (std::size_t i = 0; i < kPARTIALS; ++i) sum += partial[i];
    return sum;
}

// sqrt(var(z) / max(var(s), floor)) of one token, s being z where kept and 0 elsewhere; population
// variances in float64, in one pass. The mean of z may dwarf its spread, so its moments are taken
// about its first value, which lies within sqrt(count) standard deviations of the mean: the square
// that is subtracted is at most `count` times the variance, and float64 has the digits for that. s
// is partly zeros, so its second moment cannot drown in the square of its mean.
float varianceRatio(const float* z, const std::uint64_t* keep, std::size_t count, double floor) {
    const std::size_t whole = count / kPARTIALS * kPARTIALS;
    const std::size_t left = count - whole;
    const auto keepAt = [keep](std::size_t p) {
        return static_cast<std::uint32_t>(keep[p / 64] >> (p % 64) & 0xffff);
    };
    const double center = static_cast<double>(z[0]);
    const Doubles centers = Doubles{} + center;

    Sums sums;
    for (std::size_t p = 0; p < whole; p += kPARTIALS) {
        addMoments(z + p, keepAt(p), centers, &sums);
    }
    if (left != 0) {
        float last[kPARTIALS];
        for (std::size_t i = 0; i < kPARTIALS; ++i) last[i] = i < left ? z[whole + i] : z[0];
        const std::uint32_t present = (1u << left) - 1u;
        addMoments(last, keepAt(whole) & present, centers, &sums);  // z[0] - center adds nothing
    }
    const double channels = static_cast<double>(count);
    const double offset = total(sums.offset) / channels;
    const double keptMean = total(sums.kept) / channels;
    const double variance = total(sums.offsetSquare) / channels - offset * offset;
    const double kept = total(sums.keptSquare) / channels - keptMean * keptMean;
    const double floored = kept < floor ? floor : kept;  // NaN stays NaN
    // A constant token may come out below zero by a rounding error.
    return static_cast<float>(__builtin_sqrt((variance < 0.0 ? 0.0 : variance) / floored));
}

template <typename T>
void convert(const T* from, std::size_t count, float* to) {
    constexpr std::size_t kLANES = Simd::kLANES;
    std::size_t k = 0;
    for (; k + kLANES <= count; k += kLANES) Simd::store(to + k, Simd::load(from + k));
    for (; k < count; ++k) to[k] = toFloat(from[k]);
}

// z[p] = x[order[p]].
template <typename T>
void gather(const T* x, const std::int32_t* order, std::size_t count, float* z) {
    std::size_t p = 0;
    if constexpr (std::is_same_v<T, float>) {
        constexpr std::size_t kLANES = Simd::kLANES;
        for (; p + kLANES <= count; p += kLANES) Simd::store(z + p, Simd::gather(x, order + p));
    }
    for (; p < count; ++p) z[p] = toFloat(x[order[p]]);
}

template <typename T>
float loadToken(const TokenInput& token, float* z) {
    const T* x = static_cast<const T*>(token.x);
    const std::int32_t* order = token.channelOrder;
    if (order == nullptr) {
        convert(x, token.channels, z);
    } else {
        gather(x, order, token.channels, z);
    }

    if (token.dynamicShift) {
        const float eta = static_cast<float>(mean(z, token.channels));
        for (std::size_t p = 0; p < token.channels; ++p) z[p] -= eta;
        return eta;
    }
    if (token.shift == nullptr) return 0.0f;
    if (token.shiftCount == 1) {
        for (std::size_t p = 0; p < token.channels; ++p) z[p] -= token.shift[0];
    } else {
        for (std::size_t p = 0; p < token.channels; ++p) z[p] -= token.shift[p];
    }
    return 0.0f;
}

void scaleValues(const float* scale, std::size_t channels, float* z) {
    for (std::size_t p = 0; p < channels; ++p) z[p] *= scale[p];
}

template <typename T>
inline Simd::F loadUpTo(const T* from, int count) {
    return count == Simd::kLANES ? Simd::load(from) : Simd::loadPartial(from, count);
}

template <typename T>
void epilogue(const Epilogue& e) {
    const T* bias = static_cast<const T*>(e.bias);
    T* y = static_cast<T*>(e.y);
    const Simd::F nu = Simd::broadcast(e.factors.nu);
    const Simd::F eta = Simd::broadcast(e.factors.eta);
    for (std::size_t j = 0; j < e.columns; j += Simd::kLANES) {
        const std::size_t left = e.columns - j;
        const int count = left < Simd::kLANES ? static_cast<int>(left) : Simd::kLANES;
        Simd::F sum = loadUpTo(e.sums + j, count);
        if (e.weightScale != nullptr) sum = Simd::mul(loadUpTo(e.weightScale + j, count), sum);
        sum = Simd::mul(nu, sum);
        if (e.shiftWeight != nullptr) {
            sum = Simd::add(sum, Simd::mul(eta, loadUpTo(e.shiftWeight + j, count)));
        }
        if (bias != nullptr) sum = Simd::add(sum, loadUpTo(bias + j, count));
        if (count == Simd::kLANES) {
            Simd::store(y + j, sum);
        } else {
            Simd::storePartial(y + j, sum, count);
        }
    }
}

}  // namespace
}  // namespace nmexport
