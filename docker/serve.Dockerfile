# Triton with what the text model needs. The model is no part of the image: mount its package.
#
#   docker build -f docker/serve.Dockerfile -t nmexport-serve .
#   docker run --rm -p 127.0.0.1:8000:8000 -p 127.0.0.1:9000:9000 \
#       -v "$PWD/work/package/current:/package:ro" nmexport-serve
#
# For a package that was made on a GPU, and computes there:
#   docker build -f docker/serve.Dockerfile --build-arg DEVICE=gpu -t nmexport-serve-gpu .
#   docker run --rm --gpus all -p ... -v ... nmexport-serve-gpu
#
# The release of build.Dockerfile: a plan runs with the TensorRT that built it, 10.14 in 25.11.
ARG TRITON_VERSION=25.11
FROM nvcr.io/nvidia/tritonserver:${TRITON_VERSION}-py3

# cpu or gpu: which build of ONNX Runtime is installed.
ARG DEVICE=cpu
COPY docker/serve-requirements.txt docker/serve-${DEVICE}-requirements.txt /tmp/
# An environment of its own: the image's Python belongs to its distribution.
RUN python3 -m venv --without-pip /opt/nmexport \
    && python3 -m pip --python /opt/nmexport/bin/python3 install --no-cache-dir --no-deps \
        -r /tmp/serve-requirements.txt -r "/tmp/serve-${DEVICE}-requirements.txt" \
    && rm /tmp/serve-*requirements.txt

COPY pyproject.toml README.md LICENSE /src/
COPY nmexport /src/nmexport
COPY plugins /src/plugins
COPY recipes /src/recipes
# The native library travels with each model: a package that failed to build one here is no fault.
RUN python3 -m pip --python /opt/nmexport/bin/python3 install --no-cache-dir --no-deps /src \
    && rm -r /src

RUN useradd --uid 10001 --create-home serve
# Triton's Python backend takes its environment from the first python3 on PATH.
ENV PATH=/opt/nmexport/bin:$PATH

USER 10001
# HTTP, gRPC, metrics, OpenAI's API.
EXPOSE 8000 8001 8002 9000
HEALTHCHECK --interval=10s --timeout=3s --start-period=120s \
    CMD ["curl", "--fail", "--silent", "http://127.0.0.1:8000/v2/health/ready"]
# In a container 0.0.0.0 is the container's own network; what is published is the caller's choice.
ENV BIND=0.0.0.0
# The package's own launch line: it names the plugins of an engine, and leaves out what cannot run.
CMD ["/bin/sh", "/package/launch.sh"]
