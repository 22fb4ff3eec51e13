// Reading in order and nothing else: the ceiling that measurements are held against. Included by
// each variant after its Simd.

namespace nmexport {
namespace {

// The exclusive or of all words of whole 256-byte blocks, so that nothing is left out.
std::uint64_t readWords(const void* data, std::size_t bytes) {
    using Words = std::uint64_t __attribute__((vector_size(Simd::kLANES * sizeof(float))));
    constexpr std::size_t kCHAINS = 256 / sizeof(Words);
    constexpr std::size_t kAHEAD = 4096;  // bytes asked for early: the hardware alone reads slower
    Words sums[kCHAINS] = {};
    const char* from = static_cast<const char*>(data);
    for (std::size_t at = 0; at + sizeof sums <= bytes; at += sizeof sums) {
        for (std::size_t chain = 0; chain < kCHAINS; ++chain) {
            Words words;
            Simd::prefetch(from + at + kAHEAD + chain * sizeof words);
            std::memcpy(&words, from + at + chain * sizeof words, sizeof words);
            sums[chain] ^= words;
        }
    }
    std::uint64_t total = 0;
    for (const Words& sum : sums) {
        for (std::size_t i = 0; i < sizeof sum / sizeof sum[0]; ++i) total ^= sum[i];
    }
    return total;
}

}  // namespace
}  // namespace nmexport
