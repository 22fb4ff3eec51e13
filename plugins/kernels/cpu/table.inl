// The variant's table. Included by each variant after its functions.

namespace nmexport {
namespace {

constexpr Variant makeVariant(const char* name) {
    return Variant{
        name,
        Simd::kLANES,
        {loadToken<float>, loadToken<Float16>, loadToken<BFloat16>},
        scoreKeys,
        selectGroups,
        varianceRatio,
        {rowProduct<float>, rowProduct<Float16>, rowProduct<BFloat16>},
        {panelProduct<float>, panelProduct<Float16>, panelProduct<BFloat16>},
        {epilogue<float>, epilogue<Float16>, epilogue<BFloat16>},
    };
}

}  // namespace
}  // namespace nmexport
