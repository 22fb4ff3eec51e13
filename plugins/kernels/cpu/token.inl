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

template <typename T>
double mean(const T* values, std::size_t count) {
    double partial[kPARTIALS] = {};
    std::size_t k = 0;
    for (; k + kPARTIALS <= count; k += kPARTIALS) {
        for (std::size_t i = 0; i < kPARTIALS; ++i) {
            partial[i] += static_cast<double>(toFloat(values[k + i]));
        }
    }
    for (std::size_t i = 0; k + i < count; ++i) {
        partial[i] += static_cast<double>(toFloat(values[k + i]));
    }
    return total(partial) / static_cast<double>(count);
}

double variance(const float* values, std::size_t count) {
    const double center = mean(values, count);
    double partial[kPARTIALS] = {};
    std::size_t k = 0;
    for (; k + kPARTIALS <= count; k += kPARTIALS) {
        for (std::size_t i = 0; i < kPARTIALS; ++i) {
            const double offset = static_cast<double>(values[k + i]) - center;
            partial[i] += offset * offset;
        }
    }
    for (std::size_t i = 0; k + i < count; ++i) {
        const double offset = static_cast<double>(values[k + i]) - center;
        partial[i] += offset * offset;
    }
    return total(partial) / static_cast<double>(count);
}

template <typename T>
void convert(const T* from, std::size_t count, float* to) {
    constexpr std::size_t kLANES = Simd::kLANES;
    std::size_t k = 0;
    for (; k + kLANES <= count; k += kLANES) Simd::store(to + k, Simd::load(from + k));
    for (; k < count; ++k) to[k] = toFloat(from[k]);
}

template <typename T>
float loadToken(const TokenInput& token, float* z) {
    const T* x = static_cast<const T*>(token.x);
    const std::int32_t* order = token.channelOrder;
    if (order == nullptr) {
        convert(x, token.channels, z);
    } else {
        for (std::size_t p = 0; p < token.channels; ++p) z[p] = toFloat(x[order[p]]);
    }

    if (token.dynamicShift) {
        const float eta = static_cast<float>(mean(x, token.channels));
        for (std::size_t p = 0; p < token.channels; ++p) z[p] -= eta;
        return eta;
    }
    if (token.shift == nullptr) return 0.0f;
    if (token.shiftCount == 1) {
        for (std::size_t p = 0; p < token.channels; ++p) z[p] -= token.shift[0];
    } else if (order == nullptr) {
        for (std::size_t p = 0; p < token.channels; ++p) z[p] -= token.shift[p];
    } else {
        for (std::size_t p = 0; p < token.channels; ++p) z[p] -= token.shift[order[p]];
    }
    return 0.0f;
}

template <typename T>
inline Simd::F loadUpTo(const T* from, int count) {
    return count == Simd::kLANES ? Simd::load(from) : Simd::loadPartial(from, count);
}

template <typename T>
void epilogue(const Epilogue& e) {
    const T* bias = static_cast<const T*>(e.bias);
    T* y = static_cast<T*>(e.y);
    const Simd::F nu = Simd::broadcast(e.nu);
    const Simd::F eta = Simd::broadcast(e.eta);
    for (std::size_t j = 0; j < e.columns; j += Simd::kLANES) {
        const std::size_t left = e.columns - j;
        const int count = left < Simd::kLANES ? static_cast<int>(left) : Simd::kLANES;
        Simd::F sum = Simd::mul(nu, loadUpTo(e.sums + j, count));
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
