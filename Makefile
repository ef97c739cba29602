# make demo   set up .venv, build, draw with the shipped model, say where the picture is
# make test   the same environment; all tests but the slowest (those for GPUs skip themselves
#             without one); PYTEST_ARGS="-m slow" runs those
# make env    the environment alone
# make lint   ruff, mypy, clang-format
# make cuda   compile all CUDA code, with nvcc from PyPI where there is none
# make arm    build the host's C++ library for ARM and run its tests in an emulator, if there is one
# make docs   build the documentation site in out/site
# make wheels build wheels for every Python and CUDA that is here, check and try them (out of dist/)
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
# Errors alone: pip warns of every index, link and script folder that a machine's settings name.
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
# What is imported, which is a small part of what is installed, Python compiles itself, once.
INSTALL := $(PIP) install --no-compile
unexport PYTHONDONTWRITEBYTECODE
NATIVE := $(shell find csrc -type f 2>/dev/null | sed 's/ /\\ /g')
PYTHON_FILES := $(shell find python asyncdiff_core -name '*.py' -o -name '*.safetensors')
BUILD := $(wildcard pyproject.toml setup.py CMakeLists.txt)

.PHONY: force announce wheels demo test lint cuda arm docs clean env
demo: announce out/demo.png
	@echo "the picture: $(abspath out/demo.png)"

# Drawn again when anything that it depends on changed, or DEMO_ARGS differ from the last time.
out/demo.png: $(STAMPS)/package $(STAMPS)/demo_args $(PYTHON_FILES)
	$(BIN)/asyncdiff demo --out $@ $(DEMO_ARGS)

$(STAMPS)/demo_args: force | $(STAMPS)/package
	@$(file >$@.new,$(DEMO_ARGS))
	cmp -s $@.new $@ && rm $@.new || mv $@.new $@

# Of the steps that are still to do, on two cores; what is downloaded at 10 MB/s.
announce:
	@[ -e out/demo.png ] || echo "The first time takes minutes, each step about:"
	[ -e $(STAMPS)/venv ] || echo "  5 s    a virtual environment in $(VENV)"
	[ -e $(STAMPS)/torch ] || echo "  1 min  $(TORCH): 200 MB (with a GPU, 3 GB: 5 min)"
	[ -e $(STAMPS)/build ] || echo "  10 s   what builds the C++ extension"
	[ -e $(STAMPS)/package ] || echo "  2 min  the extension (with nvcc, 4 min), and what asyncdiff[$(EXTRAS)] needs"
	[ -e out/demo.png ] || echo "  2 min  pictures from the shipped model, plainly and in parallel"

test: $(STAMPS)/package
	gpu="$$(nvidia-smi -L 2>/dev/null || true)"
	# Without a GPU its tests skip themselves, beside the others.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n $(WORKERS) --dist worksteal \
		tests/host $$([ "$$gpu" ] || echo tests/gpu) $(PYTEST_ARGS)
	# One at a time: some of them time what a GPU does. 5: PYTEST_ARGS chose none of these.
	[ -z "$$gpu" ] || $(BIN)/python -m pytest tests/gpu $(PYTEST_ARGS) || [ $$? = 5 ]

env: $(STAMPS)/package

lint: $(STAMPS)/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python benchmarks/tables.py --check
	$(BIN)/python benchmarks/figures.py --check
	find csrc examples/cpp examples/c examples/stacks \( -name '*.c' -o -name '*.h' -o -name '*.hpp' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' \) \
		-print0 | xargs -0 -r $(BIN)/clang-format --dry-run --Werror

# What a page links to and does not find is an error.
docs: $(STAMPS)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict
	@echo "the site: file://$(abspath out/site/index.html)"

# A wheel of its own, not the installed package: what users get from pip, with CUDA in it, must
# also be importable on a machine without a driver, and a C++ program must build against it. For the
# oldest GPUs and for those whose kernels have code of their own; the package is built for all.
cuda: $(STAMPS)/build
	@ASYNCDIFF_CUDA=on $(BIN)/python csrc/packaging/pypi_cuda.py >$(STAMPS)/cuda.txt
	$(INSTALL) -r $(STAMPS)/cuda.txt
	rm -rf build/cuda
	export CUDAARCHS="$${CUDAARCHS:-75-real;90}"
	ASYNCDIFF_CUDA=on $(PIP) wheel --no-build-isolation --no-deps -w build/cuda .
	$(INSTALL) --no-deps --target build/cuda/site build/cuda/*.whl
	cd build/cuda
	export PYTHONPATH=site PATH="$(abspath $(BIN)):$$PATH"
	python -c "$$CHECK_CUDA"
	cmake -S ../../examples/cpp -B example -Dasyncdiff_core_DIR="$$(python -m asyncdiff_core --cmakedir)"
	cmake --build example
	example/exchange

wheels: $(STAMPS)/venv
	$(BIN)/python csrc/packaging/wheels.py dist

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
		! $(BIN)/python -m pip index versions torch 2>/dev/null | grep -qF "$$version+cpu"; then
		index=(--extra-index-url https://download.pytorch.org/whl/cpu)
	fi
	echo "installing $(TORCH) $${index[*]}"
	$(INSTALL) "$${index[@]}" '$(TORCH)'
	touch $@

$(STAMPS)/build: $(STAMPS)/torch pyproject.toml
	@$(BIN)/python -c "$$REQUIRES" build-system requires >$(STAMPS)/requires.txt
	echo "installing what builds the extension"
	$(BIN)/python csrc/packaging/pypi_cuda.py >>$(STAMPS)/requires.txt
	$(INSTALL) -r $(STAMPS)/requires.txt
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
	$(INSTALL) --no-build-isolation -e '.[$(EXTRAS)]'
	touch $@

$(STAMPS)/docs: $(STAMPS)/venv pyproject.toml
	@$(BIN)/python -c "$$REQUIRES" project optional-dependencies docs >$(STAMPS)/docs.txt
	$(INSTALL) -r $(STAMPS)/docs.txt
	touch $@

$(STAMPS)/lint: $(STAMPS)/package
	@$(INSTALL) $(LINTERS)
	touch $@
