// The functions of step.h for one token or one page. Included by each variant after its Simd.
//
// Loops over kWIDTH lanes are plain C++: compilers turn them into this variant's vectors, and what
// a lane computes is the same in all of them.
#include "step.h"

namespace nmexport {
namespace {

constexpr std::size_t kWIDTH = 16;
// Rows of queries, and vectors of what they meet, that are in registers at a time.
constexpr int kROWS = 4;
constexpr int kKEY_VECTORS = kPAGE / Simd::kLANES < 2 ? 1 : 2;
constexpr int kVALUE_VECTORS = Simd::kREGISTERS >= 32 ? 4 : 2;

// e^x within 2 units in the last place: x = n ln 2 + r, and a polynomial of r.
inline float exponential(float x) {
    constexpr float kLEAST = -87.0f, kMOST = 88.0f;
    // Adding this rounds to an integer, which is then in the low bits.
    constexpr float kROUND = 12582912.0f;
    const float bounded = x < kLEAST ? kLEAST : (x > kMOST ? kMOST : x);
    const float shifted = bounded * 1.44269504088896341f + kROUND;
    const float n = shifted - kROUND;
    const float r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    const float fraction = p * (r * r) + r + 1.0f;
    const std::uint32_t power = (bitsOf(shifted) - bitsOf(kROUND) + 127u) << 23;
    const float value = fraction * floatOf(power);
    return x < kLEAST ? 0.0f : value;
}

// The sum of kWIDTH lanes, in one order.
inline float total(const float* lanes) {
    float half[kWIDTH];
    for (std::size_t i = 0; i < kWIDTH; ++i) half[i] = lanes[i];
    for (std::size_t width = kWIDTH / 2; width > 0; width /= 2) {
        for (std::size_t i = 0; i < width; ++i) half[i] += half[i + width];
    }
    return half[0];
}

template <int kCOUNT>
void scoreRows(const PageScores& page, std::size_t row) {
    for (std::size_t first = 0; first < kPAGE; first += kKEY_VECTORS * Simd::kLANES) {
        typename Simd::F sums[kCOUNT][kKEY_VECTORS];
        for (int r = 0; r < kCOUNT; ++r) {
            for (int v = 0; v < kKEY_VECTORS; ++v) sums[r][v] = Simd::broadcast(0.0f);
        }
        for (std::size_t d = 0; d < page.headDim; ++d) {
            typename Simd::F keys[kKEY_VECTORS];
            for (int v = 0; v < kKEY_VECTORS; ++v) {
                keys[v] = Simd::load(page.keys + d * kPAGE + first +
                                     static_cast<std::size_t>(v) * Simd::kLANES);
            }
            for (int r = 0; r < kCOUNT; ++r) {
                const typename Simd::F query = Simd::broadcast(
                    page.queries[(row + static_cast<std::size_t>(r)) * page.headDim + d]);
                for (int v = 0; v < kKEY_VECTORS; ++v) {
                    sums[r][v] = Simd::fma(query, keys[v], sums[r][v]);
                }
            }
        }
        for (int r = 0; r < kCOUNT; ++r) {
            float* to = page.scores + (row + static_cast<std::size_t>(r)) * page.stride + first;
            for (int v = 0; v < kKEY_VECTORS; ++v) {
                Simd::store(to + static_cast<std::size_t>(v) * Simd::kLANES, sums[r][v]);
            }
        }
    }
}

void scorePage(const PageScores& page) {
    std::size_t row = 0;
    for (; row + kROWS <= page.rows; row += kROWS) scoreRows<kROWS>(page, row);
    switch (page.rows - row) {
        case 3:
            return scoreRows<3>(page, row);
        case 2:
            return scoreRows<2>(page, row);
        case 1:
            return scoreRows<1>(page, row);
        default:
            return;
    }
}

// Dimensions [d, d + kVECTORS vectors) of kCOUNT rows.
template <int kCOUNT, int kVECTORS>
void addColumns(const PageSums& page, std::size_t row, std::size_t d) {
    typename Simd::F sums[kCOUNT][kVECTORS];
    float* to = page.sums + row * page.dims + d;
    for (int r = 0; r < kCOUNT; ++r) {
        for (int v = 0; v < kVECTORS; ++v) {
            sums[r][v] = Simd::load(to + static_cast<std::size_t>(r) * page.dims +
                                    static_cast<std::size_t>(v) * Simd::kLANES);
        }
    }
    const float* weights = page.weights + row * page.stride;
    for (std::size_t p = page.first; p < page.last; ++p) {
        typename Simd::F values[kVECTORS];
        for (int v = 0; v < kVECTORS; ++v) {
            values[v] = Simd::load(page.values + p * page.headDim + d +
                                   static_cast<std::size_t>(v) * Simd::kLANES);
        }
        for (int r = 0; r < kCOUNT; ++r) {
            const typename Simd::F weight =
                Simd::broadcast(weights[static_cast<std::size_t>(r) * page.stride + p]);
            for (int v = 0; v < kVECTORS; ++v) {
                sums[r][v] = Simd::fma(weight, values[v], sums[r][v]);
            }
        }
    }
    for (int r = 0; r < kCOUNT; ++r) {
        for (int v = 0; v < kVECTORS; ++v) {
            Simd::store(to + static_cast<std::size_t>(r) * page.dims +
                            static_cast<std::size_t>(v) * Simd::kLANES,
                        sums[r][v]);
        }
    }
}

// The dimensions behind the last whole vector.
template <int kCOUNT>
void addTail(const PageSums& page, std::size_t row, std::size_t d) {
    const int count = static_cast<int>(page.dims - d);
    for (std::size_t r = row; r < row + kCOUNT; ++r) {
        float* to = page.sums + r * page.dims + d;
        typename Simd::F sum = Simd::loadPartial(to, count);
        for (std::size_t p = page.first; p < page.last; ++p) {
            const typename Simd::F weight = Simd::broadcast(page.weights[r * page.stride + p]);
            const float* values = page.values + p * page.headDim + d;
            sum = Simd::fma(weight, Simd::loadPartial(values, count), sum);
        }
        Simd::storePartial(to, sum, count);
    }
}

template <int kCOUNT>
void addRows(const PageSums& page, std::size_t row) {
    constexpr std::size_t kTILE = static_cast<std::size_t>(kVALUE_VECTORS) * Simd::kLANES;
    std::size_t d = 0;
    for (; d + kTILE <= page.dims; d += kTILE) addColumns<kCOUNT, kVALUE_VECTORS>(page, row, d);
    for (; d + Simd::kLANES <= page.dims; d += Simd::kLANES) {
        addColumns<kCOUNT, 1>(page, row, d);
    }
    if (d < page.dims) addTail<kCOUNT>(page, row, d);
}

void addPage(const PageSums& page) {
    std::size_t row = 0;
    for (; row + kROWS <= page.rows; row += kROWS) addRows<kROWS>(page, row);
    switch (page.rows - row) {
        case 3:
            return addRows<3>(page, row);
        case 2:
            return addRows<2>(page, row);
        case 1:
            return addRows<1>(page, row);
        default:
            return;
    }
}

float softmax(float* scores, std::size_t begin, std::size_t end) {
    constexpr float kNOTHING = -__builtin_inff();
    const std::size_t first = begin / kWIDTH * kWIDTH;
    const std::size_t last = (end + kWIDTH - 1) / kWIDTH * kWIDTH;
    for (std::size_t i = first; i < begin; ++i) scores[i] = kNOTHING;
    for (std::size_t i = end; i < last; ++i) scores[i] = kNOTHING;
    float largest[kWIDTH];
    for (float& lane : largest) lane = kNOTHING;
    for (std::size_t at = first; at < last; at += kWIDTH) {
        for (std::size_t i = 0; i < kWIDTH; ++i) {
            largest[i] = scores[at + i] > largest[i] ? scores[at + i] : largest[i];
        }
    }
    float top = largest[0];
    for (const float lane : largest) top = lane > top ? lane : top;
    float sums[kWIDTH] = {};
    for (std::size_t at = first; at < last; at += kWIDTH) {
        float weights[kWIDTH];
        for (std::size_t i = 0; i < kWIDTH; ++i) weights[i] = exponential(scores[at + i] - top);
        for (std::size_t i = 0; i < kWIDTH; ++i) {
            scores[at + i] = weights[i];
            sums[i] += weights[i];
        }
    }
    return total(sums);
}

void gatedSiluRow(const float* gate, const float* up, std::size_t count, float* y) {
    for (std::size_t i = 0; i < count; ++i) {
        y[i] = gate[i] / (1.0f + exponential(-gate[i])) * up[i];
    }
}

void normRow(const NormArguments& token) {
    float squares[kWIDTH] = {};
    const float* x = token.x;
    if (token.skip != nullptr) {
        for (std::size_t i = 0; i < token.channels; ++i) token.sum[i] = token.x[i] + token.skip[i];
        x = token.sum;
    }
    const std::size_t whole = token.channels / kWIDTH * kWIDTH;
    for (std::size_t at = 0; at < whole; at += kWIDTH) {
        for (std::size_t i = 0; i < kWIDTH; ++i) squares[i] += x[at + i] * x[at + i];
    }
    for (std::size_t at = whole; at < token.channels; ++at) squares[at - whole] += x[at] * x[at];
    const float mean = total(squares) / static_cast<float>(token.channels);
    const float factor = 1.0f / __builtin_sqrtf(mean + token.epsilon);
    for (std::size_t i = 0; i < token.channels; ++i) token.y[i] = x[i] * factor * token.weight[i];
}

constexpr StepFunctions kSTEP_FUNCTIONS{scorePage, addPage, softmax, gatedSiluRow, normRow};

}  // namespace
}  // namespace nmexport
