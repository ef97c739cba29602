# make demo   set up .venv, build, draw with the shipped model, say where the picture is
# make test   the same environment; all tests (those for GPUs skip themselves without one)
# make env    the environment alone
# make lint   ruff, mypy, clang-format
# make cuda   compile all CUDA code with nvcc, where there is one
# make arm    build the host's C++ library for ARM and run its tests in an emulator, if there is one
# make docs   build the documentation site in out/site
# make clean  remove what was built (and .venv)
#
# What was done leaves a stamp in .venv/stamps, so that nothing is installed twice. A changed
# source in csrc builds again; Python sources are used where they lie.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.NOTPARALLEL:

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
EXTRAS ?= diffusers,demo,test
LINTERS ?= ruff==0.17.6 mypy==2.4.1 clang-format==23.1.5
PYTEST_ARGS ?=
# Processes of one thread each: threads of several tests would be in each other's way.
WORKERS ?= $(shell n=$$(nproc); echo $$((n < 8 ? n : 8)))
DEMO_ARGS ?=

BIN := $(VENV)/bin
STAMPS := $(VENV)/stamps
PIP := $(BIN)/python -m pip --disable-pip-version-check
NATIVE := $(shell find csrc -type f 2>/dev/null | sed 's/ /\\ /g')
BUILD := $(wildcard pyproject.toml setup.py CMakeLists.txt)

.PHONY: demo test lint cuda arm docs clean env
demo: $(STAMPS)/package
	$(BIN)/asyncdiff demo --out out/demo.png $(DEMO_ARGS)

test: $(STAMPS)/package
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal tests/host $(PYTEST_ARGS)
	# One at a time: some of them time what a GPU does. 5: PYTEST_ARGS chose none of these.
	$(BIN)/python -m pytest tests/gpu $(PYTEST_ARGS) || [ $$? = 5 ]

env: $(STAMPS)/package

lint: $(STAMPS)/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python benchmarks/tables.py --check
	$(BIN)/python benchmarks/figures.py --check
	find csrc examples/cpp \( -name '*.h' -o -name '*.hpp' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' \) \
		-print0 | xargs -0 -r $(BIN)/clang-format --dry-run --Werror

# What a page links to and does not find is an error.
docs: $(STAMPS)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict
	@echo "the site: file://$(abspath out/site/index.html)"

# A wheel of its own, not the installed package: what users get from pip, with CUDA in it, must
# also be importable on a machine without a driver, and a C++ program must build against it.
cuda: $(STAMPS)/build
	@if ! command -v nvcc >/dev/null; then
		echo "make cuda: no nvcc on the PATH, so no CUDA code was compiled."
		echo "Install the CUDA toolkit 12 or 13 and put its bin folder on the PATH."
		exit 0
	fi
	rm -rf build/cuda
	ASYNCDIFF_CUDA=on $(PIP) wheel -q --no-build-isolation --no-deps -w build/cuda .
	$(PIP) install -q --no-deps --no-compile --target build/cuda/site build/cuda/*.whl
	cd build/cuda
	export PYTHONPATH=site PATH="$(abspath $(BIN)):$$PATH"
	python -c "$$CHECK_CUDA"
	cmake -S ../../examples/cpp -B example -Dasyncdiff_core_DIR="$$(python -m asyncdiff_core --cmakedir)"
	cmake --build example
	example/exchange

arm: $(STAMPS)/build
	@if ! command -v aarch64-linux-gnu-g++ >/dev/null || ! command -v qemu-aarch64 >/dev/null; then
		echo "make arm: skipped, as there is no cross compiler or no emulator for ARM"
		echo "(Debian, Ubuntu: apt install g++-aarch64-linux-gnu qemu-user)"
		exit 0
	fi
	export PATH="$(abspath $(BIN)):$$PATH"
	cmake -S . -B build/arm -G Ninja --toolchain csrc/cmake/aarch64-linux.cmake --log-level=WARNING \
		-DASYNCDIFF_PYTHON=OFF -DASYNCDIFF_CUDA=off -DASYNCDIFF_TESTS=ON
	cmake --build build/arm
	ctest --test-dir build/arm --output-on-failure -j 2

define CHECK_CUDA
import asyncdiff_core as core
assert "build/cuda/site" in core.__file__, core.__file__
assert core.cuda_built(), "built without CUDA"
print("CUDA code compiled:", core.build_info())
endef
export CHECK_CUDA

clean:
	rm -rf $(VENV) build dist _skbuild out *.egg-info python/*.egg-info
	rm -rf asyncdiff_core/include asyncdiff_core/lib
	find . -name '*.so' -not -path './.git/*' -delete
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

# --- the environment, one stamp a layer

.ONESHELL:

$(STAMPS)/venv:
	@if ! command -v $(PYTHON) >/dev/null; then
		echo "Python is missing: install it (Debian, Ubuntu: apt install python3 python3-venv)"; exit 1
	fi
	if ! $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
		echo "$$($(PYTHON) --version) is too old: asyncdiff needs 3.10 or newer (make PYTHON=...)"; exit 1
	fi
	if ! $(PYTHON) -c 'import venv, ensurepip' 2>/dev/null; then
		echo "Python's venv is missing: apt install python3-venv"; exit 1
	fi
	if ! command -v "$${CXX:-c++}" >/dev/null && ! command -v g++ >/dev/null && ! command -v clang++ >/dev/null; then
		echo "A C++ compiler is missing: apt install g++"; exit 1
	fi
	$(PYTHON) -m venv $(VENV)
	mkdir -p $(STAMPS)
	touch $@

# Without a GPU, torch's CPU build: it is a tenth of the size. Where pip's own indexes have no such
# build (PyPI's brings CUDA along), torch's CPU index is asked too.
$(STAMPS)/torch: $(STAMPS)/venv
	@index=()
	version='$(TORCH)'; version="$${version##*=}"
	if ! nvidia-smi -L >/dev/null 2>&1 &&
		! $(PIP) index versions torch 2>/dev/null | grep -qF "$$version+cpu"; then
		index=(--extra-index-url https://download.pytorch.org/whl/cpu)
	fi
	echo "installing $(TORCH) $${index[*]}"
	$(PIP) install -q "$${index[@]}" '$(TORCH)'
	touch $@

$(STAMPS)/build: $(STAMPS)/torch pyproject.toml
	@$(BIN)/python -c "$$REQUIRES" build-system requires >$(STAMPS)/requires.txt
	$(PIP) install -q -r $(STAMPS)/requires.txt
	touch $@

# What a list in pyproject.toml names, found by the keys that lead to it.
define REQUIRES
import sys
try:
    import tomllib
except ImportError:  # Python 3.10
    from pip._vendor import tomli as tomllib
with open("pyproject.toml", "rb") as file:
    found = tomllib.load(file)
for key in sys.argv[1:]:
    found = found[key]
print(*found, sep="\n")
endef
export REQUIRES

# Without build isolation, so that CMake's own folder stays valid and builds only what changed.
$(STAMPS)/package: $(STAMPS)/build $(BUILD) $(NATIVE)
	@echo "building and installing asyncdiff[$(EXTRAS)]"
	$(PIP) install -q --no-build-isolation -e '.[$(EXTRAS)]'
	touch $@

$(STAMPS)/docs: $(STAMPS)/venv pyproject.toml
	@$(BIN)/python -c "$$REQUIRES" project optional-dependencies docs >$(STAMPS)/docs.txt
	$(PIP) install -q -r $(STAMPS)/docs.txt
	touch $@

$(STAMPS)/lint: $(STAMPS)/package
	@$(PIP) install -q $(LINTERS)
	touch $@
