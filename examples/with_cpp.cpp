// Continue token ids with ONNX Runtime in C++: ./with_cpp FOLDER 504 3629
#include <onnxruntime_cxx_api.h>
#include <algorithm>
#include <iostream>

int main(int count, char** words) {
    const std::string folder = words[1];
    Ort::Env env;
    Ort::SessionOptions options;
    options.RegisterCustomOpsLibrary((folder + "/libnmexport_onnxruntime.so").c_str());
    Ort::Session session(env, (folder + "/model.onnx").c_str(), options);
    Ort::AllocatorWithDefaultOptions memory;
    std::vector<const char*> in, out;   // in: ids, mask, places, caches; out: logits, caches
    std::vector<Ort::Value> values(3);  // of the inputs
    for (std::size_t i = 0; i < session.GetInputCount(); ++i) {
        in.push_back(session.GetInputNameAllocated(i, memory).release());
        if (i >= 2) out.push_back(session.GetOutputNameAllocated(i - 2, memory).release());
        auto shape = session.GetInputTypeInfo(i).GetTensorTypeAndShapeInfo().GetShape();
        shape[0] = 1, shape.at(shape.size() - 2) = 0;  // of a cache that holds nothing yet
        if (i >= 3) values.push_back(Ort::Value::CreateTensor<float>(memory, shape.data(), 4));
    }
    std::vector<std::int64_t> tokens, ones(4096, 1), places(4096);
    for (std::size_t i = 0; i < places.size(); ++i) places[i] = i;
    for (int i = 2; i < count; ++i) tokens.push_back(std::stoll(words[i]));
    for (std::size_t from = 0, to = tokens.size(), end = to + 20; to < end; from = to++) {
        const std::int64_t step[] = {1, std::int64_t(to - from)}, whole[] = {1, std::int64_t(to)};
        values[0] = Ort::Value::CreateTensor(memory.GetInfo(), &tokens[from], to - from, step, 2);
        values[1] = Ort::Value::CreateTensor(memory.GetInfo(), &ones[0], to, whole, 2);
        values[2] = Ort::Value::CreateTensor(memory.GetInfo(), &places[from], to - from, step, 2);
        auto found = session.Run({}, in.data(), values.data(), in.size(), out.data(), out.size());
        const auto size = found[0].GetTensorTypeAndShapeInfo().GetShape()[2];
        const float* last = found[0].GetTensorData<float>() + (to - from - 1) * size;
        std::cout << tokens.emplace_back(std::max_element(last, last + size) - last) << ' ';
        std::move(found.begin() + 1, found.end(), values.begin() + 3);
    }
}
