// What TensorRT's builder hands to a plugin, made by hand: fields, expressions, descriptions.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <cstring>
#include <list>
#include <memory>
#include <string>
#include <vector>

namespace nmexport::test {

// Keeps the log lines of the plugins.
class RecordingLogger : public nvinfer1::ILogger {
  public:
    void log(Severity, nvinfer1::AsciiChar const* message) noexcept override {
        lines.emplace_back(message);
    }
    bool has(const std::string& part) const {
        for (const std::string& line : lines) {
            if (line.find(part) != std::string::npos) return true;
        }
        return false;
    }
    std::vector<std::string> lines;
};

class Finder : public nvinfer1::ILoggerFinder {
  public:
    explicit Finder(nvinfer1::ILogger& logger) : mLogger(logger) {}
    virtual ~Finder() = default;
    nvinfer1::ILogger* findLogger() override { return &mLogger; }

  private:
    nvinfer1::ILogger& mLogger;
};

// Fields as the parser gives them. Owns its values; copies share them, so addresses stay.
class Fields {
  public:
    Fields& integer(const char* name, std::int32_t value) {
        mValues->integers.push_back(value);
        return add(name, &mValues->integers.back(), nvinfer1::PluginFieldType::kINT32, 1);
    }
    Fields& longInteger(const char* name, std::int64_t value) {
        mValues->longs.push_back(value);
        return add(name, &mValues->longs.back(), nvinfer1::PluginFieldType::kINT64, 1);
    }
    Fields& number(const char* name, float value) {
        mValues->floats.push_back(value);
        return add(name, &mValues->floats.back(), nvinfer1::PluginFieldType::kFLOAT32, 1);
    }
    Fields& text(const char* name, const std::string& value) {
        mValues->texts.push_back(value);
        return add(name, mValues->texts.back().data(), nvinfer1::PluginFieldType::kCHAR,
                   static_cast<std::int32_t>(value.size()));
    }
    const nvinfer1::PluginFieldCollection* collection() {
        mCollection = {static_cast<std::int32_t>(mFields.size()), mFields.data()};
        return &mCollection;
    }

  private:
    Fields& add(const char* name, const void* data, nvinfer1::PluginFieldType type,
                std::int32_t length) {
        mFields.emplace_back(name, data, type, length);
        return *this;
    }

    struct Values {
        std::list<std::int32_t> integers;
        std::list<std::int64_t> longs;
        std::list<float> floats;
        std::list<std::string> texts;
    };
    std::shared_ptr<Values> mValues = std::make_shared<Values>();
    std::vector<nvinfer1::PluginField> mFields;
    nvinfer1::PluginFieldCollection mCollection{};
};

// A copy of fields as a plan would carry them: the original may be gone.
class SerialisedFields {
  public:
    explicit SerialisedFields(const nvinfer1::PluginFieldCollection& fields) {
        for (std::int32_t i = 0; i < fields.nbFields; ++i) {
            const nvinfer1::PluginField& field = fields.fields[i];
            const std::size_t size =
                field.type == nvinfer1::PluginFieldType::kCHAR ? 1 : sizeof(std::int32_t);
            const char* bytes = static_cast<const char*>(field.data);
            mData.emplace_back(bytes, bytes + size * static_cast<std::size_t>(field.length));
            mNames.emplace_back(field.name);
            mFields.emplace_back(mNames.back().c_str(), mData.back().data(), field.type,
                                 field.length);
        }
        mCollection = {static_cast<std::int32_t>(mFields.size()), mFields.data()};
    }
    const nvinfer1::PluginFieldCollection* collection() const { return &mCollection; }
    void setInteger(const std::string& name, std::int32_t value) {
        auto data = mData.begin();
        for (const std::string& each : mNames) {
            if (each == name) std::memcpy(data->data(), &value, sizeof value);
            ++data;
        }
    }

  private:
    std::list<std::vector<char>> mData;
    std::list<std::string> mNames;
    std::vector<nvinfer1::PluginField> mFields;
    nvinfer1::PluginFieldCollection mCollection{};
};

// A size of a tensor; -1 is not known before the run.
class Expression : public nvinfer1::IDimensionExpr, private nvinfer1::apiv::VDimensionExpr {
  public:
    explicit Expression(std::int64_t value) : mValue(value) { mImpl = this; }
    virtual ~Expression() = default;

  private:
    bool isConstant() const override { return mValue >= 0; }
    std::int64_t getConstantValue() const override { return mValue; }
    bool isSizeTensor() const override { return false; }
    std::int64_t mValue;
};

class ExpressionBuilder : public nvinfer1::IExprBuilder, private nvinfer1::apiv::VExprBuilder {
  public:
    ExpressionBuilder() { mImpl = this; }
    virtual ~ExpressionBuilder() = default;

    nvinfer1::DimsExprs shape(const std::vector<std::int64_t>& sizes) {
        nvinfer1::DimsExprs dims{};
        dims.nbDims = static_cast<std::int32_t>(sizes.size());
        for (std::size_t i = 0; i < sizes.size(); ++i) {
            mExpressions.emplace_back(sizes[i]);
            dims.d[i] = &mExpressions.back();
        }
        return dims;
    }

  private:
    const nvinfer1::IDimensionExpr* constant(std::int64_t value) override {
        mExpressions.emplace_back(value);
        return &mExpressions.back();
    }
    const nvinfer1::IDimensionExpr* operation(nvinfer1::DimensionOperation,
                                              nvinfer1::IDimensionExpr const&,
                                              nvinfer1::IDimensionExpr const&) override {
        return nullptr;
    }
    const nvinfer1::IDimensionExpr* declareSizeTensor(std::int32_t, nvinfer1::IDimensionExpr const&,
                                                      nvinfer1::IDimensionExpr const&) override {
        return nullptr;
    }
    std::list<Expression> mExpressions;
};

inline nvinfer1::Dims dims(const std::vector<std::int64_t>& sizes) {
    nvinfer1::Dims made{};
    made.nbDims = static_cast<std::int32_t>(sizes.size());
    for (std::size_t i = 0; i < sizes.size(); ++i) made.d[i] = sizes[i];
    return made;
}

struct Tensor {
    std::vector<std::int64_t> sizes;
    nvinfer1::DataType type;
};

inline nvinfer1::PluginTensorDesc describe(const Tensor& tensor) {
    nvinfer1::PluginTensorDesc made{};
    made.dims = dims(tensor.sizes);
    made.type = tensor.type;
    made.format = nvinfer1::TensorFormat::kLINEAR;
    return made;
}

// From `least` to `most` in the first axis.
inline nvinfer1::DynamicPluginTensorDesc describe(const Tensor& tensor, std::int64_t least,
                                                  std::int64_t most) {
    nvinfer1::DynamicPluginTensorDesc made{};
    made.desc = describe(tensor);
    std::vector<std::int64_t> sizes = tensor.sizes;
    sizes[0] = least;
    made.min = dims(sizes);
    made.opt = dims(sizes);
    sizes[0] = most;
    made.max = dims(sizes);
    return made;
}

}  // namespace nmexport::test
