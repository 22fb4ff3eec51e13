// The table of an instruction set. Included after its functions.

namespace nmexport {
namespace {

constexpr DotKernels makeDots(const char* name) {
    constexpr IntegerFormat kINT8 = IntegerFormat::kINT8;
    constexpr IntegerFormat kINT4 = IntegerFormat::kINT4;
    constexpr IntegerFormat kUINT4 = IntegerFormat::kUINT4;
    return DotKernels{
        name,
        kSTEP_BYTES,
        packedBytes,
        quantise,
        {{rowDots<kINT8, float>, rowDots<kINT8, Float16>},
         {rowDots<kINT4, float>, rowDots<kINT4, Float16>},
         {rowDots<kUINT4, float>, rowDots<kUINT4, Float16>}},
        {{tileDots<kINT8, float>, tileDots<kINT8, Float16>},
         {tileDots<kINT4, float>, tileDots<kINT4, Float16>},
         {tileDots<kUINT4, float>, tileDots<kUINT4, Float16>}},
        {arrange<kINT8>, arrange<kINT4>, arrange<kUINT4>},
        {restoreOrder<kINT8>, restoreOrder<kINT4>, restoreOrder<kUINT4>},
    };
}

}  // namespace
}  // namespace nmexport
