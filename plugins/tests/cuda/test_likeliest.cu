// The likeliest token against a plain loop: ties, NaN, infinities, both zeros, rows of every
// length. Exit code 77 where there is no GPU.
#include "likeliest.h"
#include "reference.cuh"

#include <limits>

namespace nmexport::cuda {
namespace {

//! As NumPy's argmax says.
template <typename T>
int64_t expected(T const* row, int columns) {
    int64_t best = 0;
    for (int i = 0; i < columns; ++i) {
        float const value = widen(row[i]);
        if (std::isnan(value)) {
            return i;
        }
        if (value > widen(row[best])) {
            best = i;
        }
    }
    return best;
}

enum class Kind { kNORMAL, kTIES, kALL_EQUAL, kNEGATIVE, kZEROS, kINFINITE, kNAN };
constexpr Kind kKINDS[] = {Kind::kNORMAL, Kind::kTIES,     Kind::kALL_EQUAL, Kind::kNEGATIVE,
                           Kind::kZEROS,  Kind::kINFINITE, Kind::kNAN};

float drawn(Kind kind, std::mt19937& random) {
    constexpr float kINFINITY = std::numeric_limits<float>::infinity();
    std::normal_distribution<float> normal;
    switch (kind) {
        case Kind::kTIES:
            return static_cast<float>(random() % 5);
        case Kind::kALL_EQUAL:
            return -2.5F;
        case Kind::kNEGATIVE:
            return -1.0F - std::abs(normal(random));
        case Kind::kZEROS:
            return random() % 2 == 0 ? 0.0F : -0.0F;
        case Kind::kINFINITE:
            return random() % 7 == 0 ? kINFINITY : -kINFINITY;
        case Kind::kNAN: {
            float const nan = std::numeric_limits<float>::quiet_NaN();
            return random() % 97 == 0 ? (random() % 2 == 0 ? nan : -nan) : kINFINITY;
        }
        default:
            return 4 * normal(random);
    }
}

template <typename T>
int check(int rows, int columns, Kind kind, DeviceTraits const& device) {
    std::mt19937 random(static_cast<unsigned>(rows * 131 + columns));
    std::vector<T> x(static_cast<size_t>(rows) * columns);
    std::generate(x.begin(), x.end(), [&] { return narrow<T>(drawn(kind, random)); });
    DeviceArray<T> const values(x);
    DeviceArray<int64_t> const ids(static_cast<size_t>(rows));
    int64_t* host = nullptr;  // as the session has it: the device writes to the host's memory
    CHECK_CUDA(cudaHostAlloc(&host, rows * sizeof(int64_t), cudaHostAllocMapped));
    LikeliestArgs args{kTYPE<T>, rows, columns, values.data, ids.data};
    CHECK_CUDA(launchLikeliest(args, device, nullptr));
    args.ids = host;
    CHECK_CUDA(launchLikeliest(args, device, nullptr));
    CHECK_CUDA(cudaDeviceSynchronize());
    std::vector<int64_t> const got = ids.read();
    int wrong = 0;
    for (int row = 0; row < rows; ++row) {
        int64_t const wanted = expected(x.data() + static_cast<size_t>(row) * columns, columns);
        wrong += got[row] != wanted || host[row] != wanted;
    }
    CHECK_CUDA(cudaFreeHost(host));
    if (wrong != 0) {
        std::printf("FAILED: type %d, %d rows of %d, kind %d: %d wrong\n",
                    static_cast<int>(kTYPE<T>), rows, columns, static_cast<int>(kind), wrong);
    }
    return wrong != 0;
}

bool refuses(DeviceTraits const& device) {
    float x = 0;
    int64_t id = 0;
    LikeliestArgs const good{DType::kFLOAT32, 1, 1, &x, &id};
    LikeliestArgs bad[4] = {good, good, good, good};
    bad[0].x = nullptr;
    bad[1].ids = nullptr;
    bad[2].columns = 0;
    bad[3].rows = -1;
    bool ok = true;
    for (LikeliestArgs const& args : bad) {
        ok = ok && launchLikeliest(args, device, nullptr) == cudaErrorInvalidValue;
    }
    return ok;
}

int run() {
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) {
        std::printf("no GPU\n");
        return 77;
    }
    DeviceTraits device;
    CHECK_CUDA(queryDevice(&device));
    int cases = 0;
    int failed = refuses(device) ? 0 : 1;
    for (int const columns : {1, 7, 31, 384, 8191, 32000, 50257, 128256}) {
        for (int const rows : {1, 3, 8}) {
            for (Kind const kind : kKINDS) {
                failed += check<float>(rows, columns, kind, device);
                failed += check<__half>(rows, columns, kind, device);
                failed += check<__nv_bfloat16>(rows, columns, kind, device);
                cases += 3;
            }
        }
    }
    std::printf("%d cases, %d failed\n", cases, failed);
    return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}

}  // namespace
}  // namespace nmexport::cuda

int main() {
    return nmexport::cuda::run();
}
