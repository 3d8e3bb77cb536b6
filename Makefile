# make demo      prune a network at initialization, train it sparse on Fashion-MNIST, compare it with the dense one
# make test      the test-suite (PYTEST_ARGS="-k csr" to choose; in TEST_PROCESSES=2 processes)
# make sanitize  the tests of kernels, layers and optimizers again, on kernels built with AddressSanitizer and UndefinedBehaviorSanitizer,
#                and the random calls on every lesser instruction set; the first finding ends it (PYTEST_ARGS as above)
# make oldest    the test-suite with the oldest torch that is allowed, in an environment of its own (PYTEST_ARGS as above)
# make gpu       on a machine with a CUDA device and nvcc, in nine minutes: build, the tests that need a device, benchmarks, a table
#                (GPU_PYTHON=python3 takes that interpreter and the torch it has, nothing is installed then; GPU_SECONDS: time for
#                everything; GPU_LOGS, GPU_RESULTS: folders of logs and CSV files, or OUT for both)
# make clean     remove what was built; .venv, data and runs stay
#
# All but clean set up .venv first (make gpu: unless told otherwise): the newest torch from PyPI, then this package with its compiled kernels.

SHELL := /bin/bash
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
VENV ?= .venv
TORCH_PACKAGES ?= 'torch>=2.11' torchvision
OUT ?= runs/demo
DATA_DIR ?=
DEMO_ARGS ?=
PYTEST_ARGS ?=
TEST_PROCESSES ?= 2
GPU_PYTHON ?=
GPU_LAYERS ?=
GPU_STEPS ?=
GPU_SECONDS ?= 530
GPU_LOGS ?= $(if $(filter environment command,$(firstword $(origin OUT))),$(OUT),build/gpu-logs)
GPU_RESULTS ?= $(if $(filter environment command,$(firstword $(origin OUT))),$(OUT),benchmarks/results)

PACKAGE := $(VENV)/.package-installed
TEST_PACKAGES := $(VENV)/.test-packages-installed
TORCH := $(VENV)/.torch-installed
BUILT_FROM := setup.py pyproject.toml $(shell find csrc -type f 2>/dev/null)
DEBIAN_DATA := /usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz

# A second build beside the first, which it leaves alone. Only our kernels are instrumented: python and torch are not, so the
# sanitizers must be in the process before them, and what is allocated and never freed is not looked for. A finding aborts,
# so that Python says which test it was in.
SANITIZED := build/sanitize
SANITIZED_PYTHON = cd $(SANITIZED) && PYTHONPATH="$$PWD/lib" \
	LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 \
	UBSAN_OPTIONS=print_stacktrace=1:abort_on_error=1 $(abspath $(VENV))/bin/python

DEVICE_PYTHON = $(or $(GPU_PYTHON),$(VENV)/bin/python)

.PHONY: demo test sanitize oldest gpu clean data

demo: $(PACKAGE) data
	@$(VENV)/bin/python -m grasp_sparse train --recipe demo --out '$(OUT)' --overwrite \
		$(if $(DATA_DIR),--data-dir '$(DATA_DIR)') $(DEMO_ARGS)

# Test processes share the cores: a thread that spins while it waits for another takes a core from the next process.
test: $(TEST_PACKAGES)
	@OMP_WAIT_POLICY=passive $(VENV)/bin/python -m pytest tests -n $(TEST_PROCESSES) --dist loadfile $(PYTEST_ARGS)

sanitize: $(TEST_PACKAGES)
	@echo "building the sanitized kernels in $(SANITIZED) (some minutes the first time)"
	@PYTHONWARNINGS=ignore GRASP_SPARSE_REQUIRE_EXT=1 GRASP_SPARSE_SANITIZE=1 $(VENV)/bin/python setup.py -q build \
		--build-base $(SANITIZED) --build-lib $(SANITIZED)/lib >/dev/null
	@$(SANITIZED_PYTHON) -c 'from grasp_sparse import _extension as e; assert e.status().built["compiler"].endswith("sanitized")'
	@$(SANITIZED_PYTHON) -m pytest --capture=sys -c $(CURDIR)/pyproject.toml $(CURDIR)/tests/ops $(CURDIR)/tests/nn $(CURDIR)/tests/optim \
		--ignore=$(CURDIR)/tests/nn/test_layout_on_cuda.py $(PYTEST_ARGS)  # it asks torch for cuDNN and none of our kernels
	@for isa in $$($(SANITIZED_PYTHON) -c 'from grasp_sparse import _extension as e; print(*e.status().runnable_isas[1:])'); do \
		echo "$$isa:"; (export GRASP_SPARSE_ISA=$$isa; $(SANITIZED_PYTHON) -m pytest --capture=sys -c $(CURDIR)/pyproject.toml \
		$(CURDIR)/tests/ops/test_properties.py $(CURDIR)/tests/ops/test_norm_properties.py $(PYTEST_ARGS)) || exit 1; done

# The kernels are compiled anew and stand where the others stood: either build runs with both.
oldest:
	@$(MAKE) test VENV=.venv-oldest TORCH_PACKAGES="'torch==2.11.*' 'torchvision==0.26.*'"

gpu: $(if $(GPU_PYTHON),,$(TEST_PACKAGES))
	@$(DEVICE_PYTHON) -m benchmarks.gpu --seconds $(GPU_SECONDS) --logs '$(GPU_LOGS)' --results '$(GPU_RESULTS)' \
		--layers='$(GPU_LAYERS)' --steps='$(GPU_STEPS)' --pytest-args='$(PYTEST_ARGS)'

# Fails softly: `grasp-sparse train` looks further and says what to do when there are no data at all.
data:
	@if [ -z '$(DATA_DIR)' ] && [ ! -e $(DEBIAN_DATA) ] && [ ! -e data/FashionMNIST/raw/train-images-idx3-ubyte ] \
			&& [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "installing Fashion-MNIST (Debian package dataset-fashion-mnist)"; \
		{ timeout 120 apt-get update && DEBIAN_FRONTEND=noninteractive timeout 120 apt-get install -y \
			--no-install-recommends dataset-fashion-mnist; } >/dev/null 2>&1 \
			|| echo "apt-get could not install it; trying torchvision's download"; \
	fi

$(TORCH):
	@$(PYTHON) -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "error: Expected $(PYTHON) to be Python >= 3.11 with venv, got $$($(PYTHON) --version 2>&1 | tail -1);" \
			"install it (Debian: apt-get install python3 python3-venv python3-dev) or run make PYTHON=/path/to/python3" >&2; \
		exit 2; }
	@test -x $(VENV)/bin/python || { echo "creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing torch and build tools into $(VENV) (a minute or two)"
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
		$(TORCH_PACKAGES) 'setuptools>=77' wheel ninja
	@touch $@

$(PACKAGE): $(TORCH) $(BUILT_FROM)
	@printf '#include <Python.h>\n#include <vector>\n' | $${CXX:-c++} -x c++ -fsyntax-only -I"$$($(VENV)/bin/python -c \
		'import sysconfig; print(sysconfig.get_path("include"))')" - 2>/dev/null || { \
		echo "error: Expected a C++ compiler and Python's headers; install them (Debian: apt-get install g++ python3-dev)" >&2; \
		exit 2; }
	@echo "building grasp_sparse"
	@PYTHONWARNINGS=ignore GRASP_SPARSE_REQUIRE_EXT=1 $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -e .
	@touch $@

# What only tests need: the package is there already, so pip adds what its extra `test` lists and builds nothing.
$(TEST_PACKAGES): $(PACKAGE)
	@echo "installing what the tests need"
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check 'grasp_sparse[test]'
	@touch $@

clean:
	@rm -rf build dist *.egg-info .pytest_cache $(PACKAGE) $(TEST_PACKAGES)
	@find grasp_sparse tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
	@find grasp_sparse \( -name '*.so' -o -name '*.o' \) -delete
