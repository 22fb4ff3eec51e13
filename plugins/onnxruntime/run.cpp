#include "run.h"

namespace nmexport {

std::size_t NodeInfo::inputCount() const {
    if (mIsInside) return mInputs.size();
    std::size_t count = 0;
    check(*mApi, mApi->KernelInfo_GetInputCount(mInfo, &count));
    return count;
}

const OrtValue* NodeInfo::constant(std::size_t input) const {
    if (mIsInside) {
        if (input >= mInputs.size() || mInputs[input] < 0) return nullptr;
        input = static_cast<std::size_t>(mInputs[input]);
    }
    int isConstant = 0;
    const OrtValue* value = nullptr;
    OrtStatus* status = mApi->KernelInfoGetConstantInput_tensor(mInfo, input, &isConstant, &value);
    return succeeded(*mApi, status) && isConstant != 0 ? value : nullptr;
}

float NodeInfo::number(const char* attribute) const {
    float value = 0.0f;
    check(*mApi, mApi->KernelInfoGetAttribute_float(mInfo, nameOf(attribute).c_str(), &value));
    return value;
}

std::int64_t NodeInfo::integer(const char* attribute) const {
    std::int64_t value = 0;
    check(*mApi, mApi->KernelInfoGetAttribute_int64(mInfo, nameOf(attribute).c_str(), &value));
    return value;
}

std::vector<std::int64_t> NodeInfo::integers(const char* attribute) const {
    const std::string name = nameOf(attribute);
    std::size_t size = 0;
    check(*mApi, mApi->KernelInfoGetAttributeArray_int64(mInfo, name.c_str(), nullptr, &size));
    std::vector<std::int64_t> values(size);
    check(*mApi,
          mApi->KernelInfoGetAttributeArray_int64(mInfo, name.c_str(), values.data(), &size));
    return values;
}

std::string NodeInfo::text(const char* attribute) const {
    const std::string name = nameOf(attribute);
    std::size_t size = 0;
    // The first call fails or not, and tells the size, terminator included.
    succeeded(*mApi, mApi->KernelInfoGetAttribute_string(mInfo, name.c_str(), nullptr, &size));
    std::string value(size, '\0');
    check(*mApi, mApi->KernelInfoGetAttribute_string(mInfo, name.c_str(), value.data(), &size));
    value.resize(size - 1);
    return value;
}

OrtRun::OrtRun(const OrtApi& api, OrtKernelContext* context, std::size_t threads)
    : mApi(api), mContext(context), mThreads(threads) {
    check(api, api.KernelContext_GetInputCount(context, &mCount));
}

const OrtValue* OrtRun::value(std::size_t input) const {
    const OrtValue* found = nullptr;
    if (input < mCount) check(mApi, mApi.KernelContext_GetInput(mContext, input, &found));
    return found;
}

void* OrtRun::data(std::size_t input) const {
    const OrtValue* found = value(input);
    return found == nullptr ? nullptr : dataOf(mApi, found);
}

void* OrtRun::output(std::size_t index, const Shape& shape) const {
    OrtValue* made = nullptr;
    check(mApi, mApi.KernelContext_GetOutput(mContext, index, shape.data(), shape.size(), &made));
    return dataOf(mApi, made);
}

ThreadPool OrtRun::threads() const {
    const auto run = [](void* raw, std::size_t tasks, void (*task)(void*, std::size_t),
                        void* state) {
        const OrtRun* self = static_cast<const OrtRun*>(raw);
        check(self->mApi,
              self->mApi.KernelContext_ParallelFor(self->mContext, task, tasks, 0, state));
    };
    return ThreadPool{run, const_cast<OrtRun*>(this), mThreads};
}

}  // namespace nmexport
