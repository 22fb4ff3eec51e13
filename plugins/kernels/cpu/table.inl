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
        listKept<Simd>,
        scaleValues,
        cutKept<Simd>,
        {rowProduct<float, false>, rowProduct<Float16, false>, rowProduct<BFloat16, false>,
         rowProduct<Int8, false>},
        {panelProduct<float, false>, panelProduct<Float16, false>, panelProduct<BFloat16, false>,
         panelProduct<Int8, false>},
        rowProduct<Int8, true>,
        panelProduct<Int8, true>,
        {epilogue<float>, epilogue<Float16>, epilogue<BFloat16>},
        readWords,
        &kSTEP_FUNCTIONS,
    };
}

}  // namespace
}  // namespace nmexport
