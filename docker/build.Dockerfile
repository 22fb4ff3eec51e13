# The TensorRT plugin against the headers of NVIDIA's own image, its unit tests, and all tests that
# need a GPU.
#
#   docker build -f docker/build.Dockerfile -t nmexport-build .      builds, and runs the unit tests
#   docker run --rm --gpus all nmexport-build                        runs the GPU tests
#   docker build -f docker/build.Dockerfile --target library -o out .    out/libnmexport_tensorrt.so
#
# 25.11 carries TensorRT 10.14 and CUDA 13; the plugin wants 10.13 or later.
ARG TENSORRT_VERSION=25.11
FROM nvcr.io/nvidia/tensorrt:${TENSORRT_VERSION}-py3 AS build

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /src

COPY requirements.lock /src/
# An environment of its own, which sees the image's TensorRT; the lock's torch is the CPU one.
# onnxruntime and onnxruntime-gpu are one module: the second in place of the first.
RUN python3 -m venv --system-site-packages /opt/nmexport \
    && /opt/nmexport/bin/python -m pip install --no-cache-dir -r requirements.lock \
    && /opt/nmexport/bin/python -m pip install --no-cache-dir "polygraphy>=0.53" "cuda-bindings>=13" \
    && /opt/nmexport/bin/python -m pip uninstall --yes onnxruntime \
    && /opt/nmexport/bin/python -m pip install --no-cache-dir "onnxruntime-gpu[cuda,cudnn]==1.31.1"
ENV PATH=/opt/nmexport/bin:$PATH
# Without the image's own TensorRT in sight every test of it would skip.
RUN python -c "import tensorrt"

COPY . /src
# The compute capabilities that the kernels are compiled for, as CMake names them.
ARG CUDA_ARCHITECTURES="75-real;80-real;86-real;89-real;90-real;100-real;120"
# 1: the ONNX Runtime ops carry the CUDA kernels too, for all GPUs; or a list such as 80;90.
ARG NMEXPORT_CUDA=1
RUN python plugins/tensorrt/build.py --tests \
    && NMEXPORT_CUDA="${NMEXPORT_CUDA}" python -m pip install --no-cache-dir --no-deps --no-build-isolation --editable . \
    && python plugins/tensorrt/build.py --architectures "${CUDA_ARCHITECTURES}" \
    && cmake --build build/plugin/library --target gpu_harness

# Kernels and plugin classes first: where they are wrong, a session can only be wrong too.
CMD ["/bin/bash", "-o", "pipefail", "-c", "build/plugin/library/gpu_harness nmexport/_native/libnmexport_tensorrt.so && python -m pytest -q tests/gpu --no-skips"]

FROM scratch AS library
COPY --from=build /src/nmexport/_native/libnmexport_tensorrt.so /

FROM build AS test
