// Attention over pages, norms and gated activations: right against float64, and the same bits
// whatever else is in the step, however a prompt is cut, on any variant and any number of threads.
#include "step.h"

#include <algorithm>
#include <cmath>
#include <thread>

#include "check.h"

using namespace nmexport;
using namespace nmexport::test;

namespace {

void runOnThreads(void* context, std::size_t tasks, void (*task)(void*, std::size_t), void* state) {
    std::vector<std::thread> threads;
    const std::size_t count = *static_cast<std::size_t*>(context);
    for (std::size_t first = 0; first < count; ++first) {
        threads.emplace_back([=] {
            for (std::size_t i = first; i < tasks; i += count) task(state, i);
        });
    }
    for (std::thread& thread : threads) thread.join();
}

ThreadPool poolOf(std::size_t& threads, bool startsFast = false) {
    return {runOnThreads, &threads, threads, startsFast};
}

// Sequences with all their tokens, and a cache whose pages lie in a random order.
struct Model {
    std::size_t heads, kvHeads, headDim, rotary, window;
    std::vector<std::size_t> lengths;
    std::vector<std::vector<float>> queries, keys, values;  // [sequence][length * heads * D]
    std::vector<float> cosines, sines;
    std::vector<std::int32_t> pages;
    std::size_t pageStride = 0, pageCount = 0;
};

Model makeModel(std::mt19937& random, std::size_t heads, std::size_t kvHeads, std::size_t headDim,
                std::size_t rotary, std::size_t window, std::vector<std::size_t> lengths) {
    Model m{heads, kvHeads, headDim, rotary, window, std::move(lengths), {}, {}, {}, {}, {}, {}};
    std::size_t longest = 0;
    for (const std::size_t length : m.lengths) {
        longest = std::max(longest, length);
        m.queries.push_back(normals(random, length * heads * headDim));
        m.keys.push_back(normals(random, length * kvHeads * headDim));
        m.values.push_back(normals(random, length * kvHeads * headDim));
    }
    m.cosines = normals(random, longest * rotary / 2);
    m.sines = normals(random, longest * rotary / 2);
    m.pageStride = (longest + kPAGE - 1) / kPAGE;
    m.pageCount = m.pageStride * m.lengths.size();
    m.pages.resize(m.pageCount);
    for (std::size_t i = 0; i < m.pageCount; ++i) m.pages[i] = static_cast<std::int32_t>(i);
    std::shuffle(m.pages.begin(), m.pages.end(), random);
    return m;
}

std::vector<double> turned(const Model& m, const float* from, std::size_t position) {
    std::vector<double> vector(from, from + m.headDim);
    const std::size_t half = m.rotary / 2;
    for (std::size_t i = 0; i < half; ++i) {
        const double c = m.cosines[position * half + i], s = m.sines[position * half + i];
        const double x = vector[i], y = vector[i + half];
        vector[i] = x * c - y * s;
        vector[i + half] = y * c + x * s;
    }
    return vector;
}

// One token's result of one head, in float64.
std::vector<double> attended(const Model& m, std::size_t sequence, std::size_t position,
                             std::size_t head, double scale) {
    const std::size_t kvHead = head / (m.heads / m.kvHeads);
    const auto query =
        turned(m, m.queries[sequence].data() + (position * m.heads + head) * m.headDim, position);
    const std::size_t begin = m.window == 0 || position < m.window ? 0 : position + 1 - m.window;
    std::vector<double> weights, y(m.headDim, 0.0);
    double largest = -1e300, total = 0.0;
    for (std::size_t p = begin; p <= position; ++p) {
        const auto key =
            turned(m, m.keys[sequence].data() + (p * m.kvHeads + kvHead) * m.headDim, p);
        double score = 0.0;
        for (std::size_t d = 0; d < m.headDim; ++d) score += query[d] * key[d];
        weights.push_back(score * scale);
        largest = std::max(largest, weights.back());
    }
    for (double& weight : weights) total += weight = std::exp(weight - largest);
    for (std::size_t p = begin; p <= position; ++p) {
        const float* value = m.values[sequence].data() + (p * m.kvHeads + kvHead) * m.headDim;
        for (std::size_t d = 0; d < m.headDim; ++d) y[d] += weights[p - begin] / total * value[d];
    }
    return y;
}

// Runs of tokens (sequence, first, count) in one step after the other; results by sequence.
struct Run {
    std::size_t sequence, first, count;
};
using Results = std::vector<std::vector<float>>;

Results inSteps(const Model& m, const std::vector<std::vector<Run>>& steps, std::size_t threads,
                bool startsFast) {
    std::vector<float> keys(m.pageCount * m.kvHeads * m.headDim * kPAGE), values(keys.size());
    Results results;
    for (const std::size_t length : m.lengths) {
        results.emplace_back(length * m.heads * m.headDim);
    }
    for (const std::vector<Run>& runs : steps) {
        std::vector<float> q, k, v;
        std::vector<std::int32_t> sequences, positions;
        const auto append = [](std::vector<float>& to, const std::vector<float>& from,
                               std::size_t width, const Run& run) {
            const auto first = from.begin() + static_cast<std::ptrdiff_t>(run.first * width);
            to.insert(to.end(), first, first + static_cast<std::ptrdiff_t>(run.count * width));
        };
        for (const Run& run : runs) {
            append(q, m.queries[run.sequence], m.heads * m.headDim, run);
            append(k, m.keys[run.sequence], m.kvHeads * m.headDim, run);
            append(v, m.values[run.sequence], m.kvHeads * m.headDim, run);
            for (std::size_t i = 0; i < run.count; ++i) {
                sequences.push_back(static_cast<std::int32_t>(run.sequence));
                positions.push_back(static_cast<std::int32_t>(run.first + i));
            }
        }
        std::vector<float> y(q.size());
        AttentionArguments a{};
        a.tokens = sequences.size();
        a.heads = m.heads;
        a.kvHeads = m.kvHeads;
        a.headDim = m.headDim;
        a.queries = q.data();
        a.newKeys = k.data();
        a.newValues = v.data();
        a.queryStride = m.heads * m.headDim;
        a.keyStride = a.valueStride = m.kvHeads * m.headDim;
        a.sequences = sequences.data();
        a.positions = positions.data();
        a.pages = m.pages.data();
        a.pageStride = m.pageStride;
        a.cosines = m.rotary > 0 ? m.cosines.data() : nullptr;
        a.sines = m.sines.data();
        a.rotary = m.rotary;
        a.keys = keys.data();
        a.values = values.data();
        a.y = y.data();
        a.scale = 0.25f;
        a.window = m.window;
        pagedAttention(a, poolOf(threads, startsFast));
        const float* from = y.data();
        for (const Run& run : runs) {
            const std::size_t width = m.heads * m.headDim;
            std::copy(
                from, from + run.count * width,
                results[run.sequence].begin() + static_cast<std::ptrdiff_t>(run.first * width));
            from += run.count * width;
        }
    }
    return results;
}

// Every sequence by itself, whole.
std::vector<std::vector<Run>> alone(const Model& m) {
    std::vector<std::vector<Run>> steps;
    for (std::size_t s = 0; s < m.lengths.size(); ++s) steps.push_back({{s, 0, m.lengths[s]}});
    return steps;
}

// Random chunks of random sequences in each step.
std::vector<std::vector<Run>> mixed(const Model& m, std::mt19937& random) {
    std::vector<std::size_t> done(m.lengths.size());
    std::vector<std::vector<Run>> steps;
    while (done != m.lengths) {
        std::vector<Run> runs;
        for (std::size_t s = 0; s < done.size(); ++s) {
            const std::size_t left = m.lengths[s] - done[s];
            const std::size_t count = std::min(left, std::size_t{random() % 12});
            if (count > 0) runs.push_back({s, done[s], count});
            done[s] += count;
        }
        if (!runs.empty()) steps.push_back(runs);
    }
    return steps;
}

void checkAttention(const Model& m, std::mt19937& random) {
    Results reference;
    for (const Variant* variant : variants()) {
        useVariant(variant->name);
        const Results whole = inSteps(m, alone(m), 1, false);
        for (std::size_t s = 0; s < m.lengths.size(); ++s) {
            for (std::size_t position = 0; position < m.lengths[s]; ++position) {
                for (std::size_t head = 0; head < m.heads; ++head) {
                    const auto wanted = attended(m, s, position, head, 0.25);
                    const float* got = whole[s].data() + (position * m.heads + head) * m.headDim;
                    double worst = 0.0;
                    for (std::size_t d = 0; d < m.headDim; ++d) {
                        worst = std::max(worst, std::abs(wanted[d] - static_cast<double>(got[d])));
                    }
                    EXPECT(worst < 2e-5);
                }
            }
        }
        const Results other = inSteps(m, mixed(m, random), 3, false);
        const Results fast = inSteps(m, mixed(m, random), 3, true);
        for (std::size_t s = 0; s < m.lengths.size(); ++s) {
            EXPECT(sameBits(whole[s], other[s]));
            EXPECT(sameBits(whole[s], fast[s]));
            if (!reference.empty()) EXPECT(sameBits(whole[s], reference[s]));
        }
        reference = whole;
    }
}

void testAttention() {
    std::mt19937 random(1);
    checkAttention(makeModel(random, 4, 2, 16, 16, 0, {1, 40, 65}), random);
    checkAttention(makeModel(random, 9, 3, 64, 64, 0, {33, 70}), random);
    checkAttention(makeModel(random, 3, 3, 24, 8, 20, {90, 5}), random);
    checkAttention(makeModel(random, 5, 1, 12, 0, 33, {64, 100}), random);
    checkAttention(makeModel(random, 8, 1, 136, 136, 0, {37}), random);
}

void testNorm() {
    std::mt19937 random(2);
    for (const std::size_t channels : {1, 7, 16, 100, 576}) {
        const std::size_t tokens = 40;
        const auto x = normals(random, tokens * channels), skip = normals(random, x.size());
        const auto weight = normals(random, channels);
        std::vector<float> reference;
        for (const Variant* variant : variants()) {
            useVariant(variant->name);
            std::vector<float> y(x.size()), sum(x.size());
            std::size_t threads = 2;
            residualNorm({tokens, channels, x.data(), skip.data(), weight.data(), y.data(),
                          sum.data(), 1e-5f},
                         poolOf(threads));
            for (std::size_t t = 0; t < tokens; ++t) {
                double squares = 0.0;
                for (std::size_t i = t * channels; i < (t + 1) * channels; ++i) {
                    EXPECT(sum[i] == x[i] + skip[i]);
                    squares += static_cast<double>(sum[i]) * static_cast<double>(sum[i]);
                }
                const double factor =
                    1.0 / std::sqrt(squares / static_cast<double>(channels) + 1e-5);
                for (std::size_t c = 0; c < channels; ++c) {
                    const double wanted = static_cast<double>(sum[t * channels + c]) * factor *
                                          static_cast<double>(weight[c]);
                    EXPECT(std::abs(wanted - static_cast<double>(y[t * channels + c])) < 1e-5);
                }
            }
            std::vector<float> plain(x.size());
            residualNorm({tokens, channels, sum.data(), nullptr, weight.data(), plain.data(),
                          nullptr, 1e-5f},
                         poolOf(threads));
            EXPECT(sameBits(plain, y));
            if (!reference.empty()) EXPECT(sameBits(y, reference));
            reference = y;
        }
    }
}

void testGatedSilu() {
    std::mt19937 random(3);
    const std::size_t tokens = 50, channels = 333;
    auto both = normals(random, tokens * 2 * channels);
    for (float& value : both) value *= 8.0f;
    both[0] = 1000.0f;
    both[1] = -1000.0f;
    std::vector<float> reference;
    for (const Variant* variant : variants()) {
        useVariant(variant->name);
        std::vector<float> y(tokens * channels);
        std::size_t threads = 2;
        gatedSilu({tokens, channels, 2 * channels, both.data(), both.data() + channels, y.data()},
                  poolOf(threads));
        for (std::size_t t = 0; t < tokens; ++t) {
            for (std::size_t c = 0; c < channels; ++c) {
                const double gate = static_cast<double>(both[2 * t * channels + c]);
                const double up = static_cast<double>(both[(2 * t + 1) * channels + c]);
                const double wanted = gate / (1.0 + std::exp(-gate)) * up;
                const double got = static_cast<double>(y[t * channels + c]);
                EXPECT(std::abs(wanted - got) <= 1e-5 * std::max(1.0, std::abs(wanted)));
            }
        }
        if (!reference.empty()) EXPECT(sameBits(y, reference));
        reference = y;
    }
}

}  // namespace

int main() {
    testAttention();
    testNorm();
    testGatedSilu();
    return report("step");
}
