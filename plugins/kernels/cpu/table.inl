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
        {rowProduct<float, Form::kPLAIN>, rowProduct<Float16, Form::kPLAIN>,
         rowProduct<BFloat16, Form::kPLAIN>, rowProduct<Int8, Form::kPLAIN>},
        {panelProduct<float, Form::kPLAIN>, panelProduct<Float16, Form::kPLAIN>,
         panelProduct<BFloat16, Form::kPLAIN>, panelProduct<Int8, Form::kPLAIN>},
        rowProduct<Int8, Form::kSCALED>,
        panelProduct<Int8, Form::kSCALED>,
        rowProduct<Int8, Form::kSHIFTED>,
        panelProduct<Int8, Form::kSHIFTED>,
        {epilogue<float>, epilogue<Float16>, epilogue<BFloat16>},
        readWords,
        &kSTEP_FUNCTIONS,
    };
}

}  // namespace
}  // namespace nmexport
