// The kernels on a GPU against float64 sums over an independently sorted mask. Small shapes, so
// that it also runs under compute-sanitizer. Exit code 77 where there is no GPU.
#include "reference.cuh"

namespace nmexport::cuda {
namespace {

//! The mask, s, eta and nu of launchMask, and the epilogue that reads them; s by position, as
//! NMLinear takes it, or by channel, as NMPrune gives it.
template <typename T>
bool checkMask(Case const& c, Problem<T> const& p, Launches<T>& on, bool isGathered,
               std::vector<Expected> const& expected) {
    on.maskArgs.isGathered = isGathered;
    CHECK_CUDA(launchMask(on.maskArgs, nullptr));
    CHECK_CUDA(launchEpilogue(on.epilogueArgs, nullptr));
    CHECK_CUDA(cudaDeviceSynchronize());
    std::vector<T> const s = on.s.read();
    std::vector<T> const epilogue = on.epilogue.read();
    std::vector<uint8_t> const keep = on.keep.read();
    std::vector<float> const eta = on.eta.read();
    std::vector<float> const nu = on.nu.read();
    bool ok = true;
    for (int token = 0; token < c.tokens; ++token) {
        Expected const& e = expected[token];
        for (int k = 0; k < c.channels; ++k) {
            int const place = c.hasOrder() && !isGathered ? p.order[k] : k;
            size_t const at = static_cast<size_t>(token) * c.channels + place;
            ok = ok && keep[at] == (e.keep[k] ? 1 : 0);
            ok = ok && widen(s[at]) == widen(narrow<T>(e.s[k]));
        }
        ok = ok && (!c.is(Options::kDYNAMIC) || eta[token] == e.eta);
        ok = ok && (!c.correctsVariance() || std::fabs(nu[token] - e.nu) <= 1e-5 * e.nu);
        ok = ok &&
             isClose(epilogue.data() + static_cast<size_t>(token) * c.outputs, e.epilogue, 1e-5);
    }
    return ok;
}

//! y of launchDecode, twice the same, on a device with these traits.
template <typename T>
bool checkDecode(Case const& c, Launches<T>& on, std::vector<Expected> const& expected,
                 DeviceTraits const& device) {
    bool const fits = decodePlan(device, kTYPE<T>, c.tokens, c.channels, c.outputs).cluster > 0;
    if (!fits) {
        return launchDecode(on.decodeArgs, device, nullptr) == cudaErrorInvalidConfiguration;
    }
    std::vector<T> runs[2];
    for (std::vector<T>& run : runs) {
        CHECK_CUDA(cudaMemset(on.y.data, 0xff, on.y.count * sizeof(T)));
        CHECK_CUDA(launchDecode(on.decodeArgs, device, nullptr));
        CHECK_CUDA(cudaDeviceSynchronize());
        run = on.y.read();
    }
    bool ok = std::memcmp(runs[0].data(), runs[1].data(), runs[0].size() * sizeof(T)) == 0;
    double const relative = 1e-5 * std::sqrt(static_cast<double>(c.channels));
    for (int token = 0; token < c.tokens; ++token) {
        ok = ok && isClose(runs[0].data() + static_cast<size_t>(token) * c.outputs,
                           expected[token].y, relative);
    }
    return ok;
}

//! This device; with the shared memory of the smaller chips of its generation, where clusters
//! shrink; without clusters and dependent launch, as code of an older architecture runs.
std::array<DeviceTraits, 3> devicesLike(DeviceTraits const& device) {
    DeviceTraits small = device;
    small.sharedBytesPerBlock = std::min(device.sharedBytesPerBlock, 99 << 10);
    DeviceTraits old = device;
    old.computeCapability = std::min(device.computeCapability, 80);
    return {device, small, old};
}

template <typename T>
bool runCase(Case const& c, DeviceTraits const& device) {
    Problem<T> const problem = problemOf<T>(c);
    std::vector<Expected> expected;
    for (int token = 0; token < c.tokens; ++token) {
        expected.push_back(expect(c, problem, token));
    }
    Launches<T> on(c, problem);
    bool ok = checkMask(c, problem, on, true, expected);
    ok = checkMask(c, problem, on, false, expected) && ok;
    for (DeviceTraits const& like : devicesLike(device)) {
        ok = checkDecode(c, on, expected, like) && ok;
    }
    if (!ok) {
        std::printf("FAILED tokens %d K %d O %d %d:%d options %d ties %d type %d\n", c.tokens,
                    c.channels, c.outputs, c.n, c.m, static_cast<int>(c.options), c.hasTies,
                    static_cast<int>(kTYPE<T>));
    }
    return ok;
}

}  // namespace
}  // namespace nmexport::cuda

int main() {
    using namespace nmexport::cuda;
    DeviceTraits const device = deviceOrSkip();
    int passed = 0;
    int failed = 0;
    std::vector<Case> cases;
    for (int tokens = 1; tokens <= kMAX_DECODE_TOKENS; ++tokens) {
        for (Options const options : {Options::kNONE, Options::kSTATIC, Options::kORDER,
                                      Options::kSCALAR, Options::kDYNAMIC}) {
            cases.push_back({tokens, 512, 256, 8, 16, options, false});
            cases.push_back({tokens, 192, 72, 8, 16, options, true});
            cases.push_back({tokens, 96, 40, 2, 4, options, true});
            cases.push_back({tokens, 128, 40, 16, 16, options, false});
            cases.push_back({tokens, 192, 33, 3, 12, options, false});
            cases.push_back({tokens, 256, 24, 20, 64, options, true});
        }
    }
    for (Case const& c : cases) {
        for (bool const ok : {runCase<float>(c, device), runCase<__half>(c, device),
                              runCase<__nv_bfloat16>(c, device)}) {
            ++(ok ? passed : failed);
        }
    }
    std::printf("%d passed, %d failed\n", passed, failed);
    return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
