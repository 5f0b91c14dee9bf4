# `make run` and `make test` do everything on a fresh machine with Python 3.11 and make.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
# More arguments for pip, e.g. PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu" for a small torch.
PIP_ARGS ?=
# Arguments for the server or the load test, e.g. make run ARGS="--port 9000".
ARGS ?=
BIN := .venv/bin
# glibc gives big buffers back to the kernel at every step otherwise; page faults then cost up to a quarter of the time.
export MALLOC_MMAP_MAX_ = 0
export MALLOC_TRIM_THRESHOLD_ = 100000000000
export MALLOC_TOP_PAD_ = 268435456

.PHONY: install run test test-slow check format bench llamacpp loadtest docs lock lock-gpu clean

install: .venv/installed

.venv/installed: requirements/cpu.lock pyproject.toml $(wildcard kernels/build.py kernels/cpu/*.cpp kernels/cpu/*.h)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check -q $(PIP_ARGS) -r requirements/cpu.lock
	$(BIN)/pip install --disable-pip-version-check -q --no-deps -e .
	$(BIN)/python -m kernels.build || true  # without them the server computes with torch alone
	touch $@

run: install
	$(BIN)/python -m server $(ARGS)

test: install
	$(BIN)/pytest

test-slow: install
	$(BIN)/pytest -m slow --timeout 1800

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install
	$(BIN)/python -m benchmarks.run $(ARGS)

# llama.cpp's batched bench, for `python -m benchmarks.llamacpp`; needs cmake and g++.
llamacpp: install
	$(BIN)/python -m benchmarks.build_llamacpp $(ARGS)

loadtest: install
	$(BIN)/python -m loadtests.run $(ARGS)

docs: install
	$(BIN)/python -m server.settings > docs/settings.md
	$(BIN)/python -m server.metrics > docs/metrics.md

# Resolve the CPU lock anew from pyproject.toml; torch stays as pinned here.
lock:
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/pip install --disable-pip-version-check -q $(PIP_ARGS) torch==2.13.0
	.venv-lock/bin/pip install --disable-pip-version-check -q $(PIP_ARGS) -e '.[dev]'
	{ echo "# CPU lock: exact versions for Python 3.11, installed by the Makefile. Made by 'make lock'."; \
	  .venv-lock/bin/pip freeze --exclude-editable | sed 's/+cpu$$//; s/^triton==.*/&; platform_system == "Linux"/'; } > requirements/cpu.lock
	rm -rf .venv-lock

# Resolve the container's lock anew: CUDA torch for Linux x86_64, and the CPU lock's versions wherever both have a package.
lock-gpu:
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/pip install --disable-pip-version-check -q uv
	{ echo "# GPU lock: exact versions for Python 3.11 on Linux x86_64, CUDA 13, installed by the Dockerfile. Made by 'make lock-gpu'."; \
	  .venv-lock/bin/uv pip compile pyproject.toml --extra gpu --constraint requirements/cpu.lock --python-version 3.11 \
	    --python-platform x86_64-manylinux_2_28 --no-config --no-header --no-annotate -q; } > requirements/gpu.lock
	rm -rf .venv-lock

clean:
	rm -rf .venv .venv-lock .pytest_cache .ruff_cache .import_linter_cache runs
