# One word a task. On a fresh machine they need Python >= 3.10 and a C++ compiler, nothing more.
#
#   make build   a virtual environment with wgpt and its test tools installed
#   make test    the test suite against that installed package      (ARGS=... goes to pytest)
#   make check   ruff, mypy, clang-format; `make format` applies what they can
#   make sanitize  every CPU target's kernels under AddressSanitizer and UBSan
#   make emulated  the same, with AVX-512 and AMX instructions emulated where the machine has none
#   make neon      the same for aarch64, in an emulator
#   make demo    the whole pipeline on the sound in the package: prepare, train, evaluate, generate
#   make docs    docs/ and the docstrings as a site, in build/site/index.html
#   make study   what mel is worth on real recordings (needs apt; never timed as a whole)
#   make faults  every command that writes, hit at every file-system event, run again, compared
#                (some 2800 cases, more than an hour; ARGS="-k prepare" for one command)
#   make fuzz    what reads files of others, with what coverage leads to (SECONDS=120 a target)
#   make bench   the CPU benchmarks
#   make gpu     on a machine with a GPU: build, test, benchmark (DRY=1: the same path without one)
#   make dev     compile wgpt/_C in the source tree for $(DEV_PYTHON), incrementally
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
JOBS ?= 2
# Compiling CUDA kernels for six architectures takes minutes: only where a GPU could run them, or
# where WGPT_CUDA says so. (A plain `pip install .` compiles them wherever nvcc is.)
WGPT_CUDA ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo AUTO || echo OFF)
ARGS ?=

VENV_PYTHON = $(abspath $(VENV))/bin/python
STAMP = $(VENV)/.wgpt-installed
SOURCES = $(shell find csrc wgpt build_backend -type f -not -name '*.so' -not -name '*.pyc') \
          CMakeLists.txt pyproject.toml

.PHONY: build test test-all check format sanitize emulated neon faults fuzz bench demo study docs gpu dev clean

build: $(STAMP)

# torch is large: one in $(PYTHON)'s own environment is used if it is new enough.
HAS_TORCH = import sys, importlib.metadata as m; \
  new = tuple(map(int, m.version("torch").split(".")[:2])) >= (2, 10); sys.exit(not new)
IS_VENV = import sys; sys.exit(sys.prefix == sys.base_prefix)

$(VENV)/bin/python:
	if $(PYTHON) -c '$(HAS_TORCH)' 2>/dev/null && ! $(PYTHON) -c '$(IS_VENV)'; \
	then $(PYTHON) -m venv --system-site-packages $(VENV); else $(PYTHON) -m venv $(VENV); fi
	$(VENV_PYTHON) -m pip install --quiet --upgrade pip

$(VENV)/.torch: | $(VENV)/bin/python
	$(VENV_PYTHON) -c '$(HAS_TORCH)' 2>/dev/null || $(VENV_PYTHON) -m pip install --quiet "$(TORCH)"
	touch $@

$(STAMP): $(VENV)/.torch $(SOURCES)
	WGPT_CUDA=$(WGPT_CUDA) CMAKE_BUILD_PARALLEL_LEVEL=$(JOBS) $(VENV_PYTHON) -m pip install ".[test]"
	touch $@

# Plain `pytest`, not `python -m pytest`: the latter puts the source wgpt/, which has no _C, first.
# A file of tests stays in one process: its fixtures are made once.
test: build
	$(VENV)/bin/pytest -n $(JOBS) --dist loadfile $(ARGS)

test-all: build
	$(VENV)/bin/pytest -m "" $(ARGS)

# The tools need no build of wgpt; mypy sees torch.
$(VENV)/.tools: $(VENV)/.torch
	$(VENV_PYTHON) -m pip install --quiet "ruff~=0.17.6" "mypy>=1.14" "clang-format~=23.1"
	touch $@

CXX_FILES = find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh'

check: $(VENV)/.tools
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(CXX_FILES) | xargs $(VENV)/bin/clang-format --dry-run --Werror

format: $(VENV)/.tools
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .
	$(CXX_FILES) | xargs $(VENV)/bin/clang-format -i

# The kernels know no torch, so this needs a compiler alone.
isa_flags = $(shell sed -n 's/^$(1) //p' csrc/kernels/cpu/dispatch/isa_flags.txt)
SANITIZE_TARGETS = generic $(if $(filter x86_64,$(shell uname -m)),avx2 avx512 avx512_bf16 amx,neon)
# With EMULATE=1: targets that run on emulated instructions, those that this machine lacks.
NEEDS_avx512 = avx512f avx512bw avx512dq avx512vl
NEEDS_avx512_bf16 = $(NEEDS_avx512) avx512_bf16
NEEDS_amx = $(NEEDS_avx512_bf16) amx_tile amx_bf16
CPU_FLAGS = $(shell grep -m1 ^flags /proc/cpuinfo)
EMULATED = $(if $(EMULATE),$(foreach target,$(filter avx512% amx,$(SANITIZE_TARGETS)), \
  $(if $(filter-out $(CPU_FLAGS),$(NEEDS_$(target))),$(target))))
EMULATE_avx512_bf16 = -DWGPT_EMULATE_BF16
EMULATE_amx = $(EMULATE_avx512_bf16) -DWGPT_EMULATE_AMX
SANITIZE_OUT = build/sanitize
SANITIZE_OBJECTS = $(patsubst %,$(SANITIZE_OUT)/%.o,dispatch \
  $(patsubst %,target_%,$(filter-out $(EMULATED),$(SANITIZE_TARGETS))) \
  $(if $(EMULATED),avx512_emulator $(EMULATED:%=emulated_%)))
SANITIZE_CXX = $(CXX) -std=c++17 -O1 -g1 -pthread -Icsrc $(SANITIZERS)
CPU_HEADERS = $(wildcard csrc/kernels/*.h csrc/kernels/cpu/*/*.h csrc/kernels/cpu/dispatch/isa_flags.txt)
SANITIZERS = -fsanitize=address,undefined -fno-sanitize-recover=all

$(SANITIZE_OUT)/%.o: csrc/kernels/cpu/dispatch/%.cpp $(CPU_HEADERS)
	@mkdir -p $(@D)
	$(SANITIZE_CXX) $(call isa_flags,$(*:target_%=%)) -c $< -o $@

$(SANITIZE_OUT)/emulated_%.o: csrc/kernels/cpu/dispatch/target_%.cpp tests/sanitize/avx512_emulator.h \
    $(CPU_HEADERS)
	@mkdir -p $(@D)
	$(SANITIZE_CXX) $(call isa_flags,avx2) $(EMULATE_$*) -Wno-psabi -include $(word 2,$^) -c $< -o $@

$(SANITIZE_OUT)/avx512_emulator.o: tests/sanitize/avx512_emulator.cpp tests/sanitize/avx512_emulator.h
	@mkdir -p $(@D)
	$(CXX) -std=c++17 -O3 -g1 -ffp-contract=off $(call isa_flags,avx2) -Wno-psabi -c $< -o $@

$(SANITIZE_OUT)/kernels: tests/sanitize/kernels.cpp $(SANITIZE_OBJECTS)
	$(SANITIZE_CXX) $(if $(EMULATE),-DWGPT_EMULATED) $^ -o $@

sanitize:
	$(MAKE) -j$(JOBS) $(SANITIZE_OUT)/kernels
	$(SANITIZE_RUN) $(SANITIZE_OUT)/kernels

# Slow to compile: a quarter of an hour on two cores.
emulated:
	$(MAKE) sanitize EMULATE=1 SANITIZE_OUT=build/emulated

# g++-aarch64-linux-gnu and qemu-user; the sanitizers do not run in an emulator.
neon:
	$(MAKE) sanitize CXX=aarch64-linux-gnu-g++ SANITIZERS= SANITIZE_TARGETS="generic neon" \
	  SANITIZE_OUT=build/neon SANITIZE_RUN="qemu-aarch64 -L /usr/aarch64-linux-gnu"

# Each finding is left beside the corpus as tests/fuzz/crash-HASH.
SECONDS ?= 120
FUZZ ?= audio json tensors upload
fuzz: build
	$(VENV_PYTHON) -m pip install --quiet "atheris>=3.0" "wgpt[serve]"
	for target in $(FUZZ); do \
	  $(VENV_PYTHON) tests/fuzz/run.py $$target $(SECONDS) || exit 1; done

faults: build
	WGPT_FAULTS_EVERY=1 $(VENV)/bin/pytest -m "" tests/faults $(ARGS)

bench: build
	for script in benchmarks/bench_*.py; do $(VENV_PYTHON) $$script $(ARGS) || exit 1; done

demo: build
	$(VENV)/bin/wgpt demo $(ARGS)

study: build
	$(VENV_PYTHON) benchmarks/recordings.py --out build/recordings
	$(VENV_PYTHON) benchmarks/study.py --recordings build/recordings --work build/study $(ARGS)

docs: build
	$(VENV_PYTHON) -m pip install --quiet "wgpt[docs]"
	$(VENV_PYTHON) docs/build_site.py

gpu:
	JOBS=$${JOBS:-$$(nproc)} $${PYTHON:-python3} benchmarks/gpu.py $(if $(DRY),--dry)

# Development: for $(DEV_PYTHON), which must have torch, pybind11, cmake and ninja. Warnings are
# errors. Put the source tree on PYTHONPATH (or in a .pth file) to use it. flock: two builds at once
# would clash.
DEV_PYTHON ?= python
DEV_CUDA ?= OFF
DEV_BUILD ?= build/dev
dev:
	@mkdir -p $(DEV_BUILD)
	PATH="$$(dirname $$($(DEV_PYTHON) -c 'import sys; print(sys.executable)')):$$PATH" \
	flock $(DEV_BUILD).lock sh -ec ' \
	  cmake -S . -B $(DEV_BUILD) -G Ninja -DWGPT_IN_PLACE=ON -DWGPT_WERROR=ON -DWGPT_CUDA=$(DEV_CUDA) \
	    -DPython_EXECUTABLE=$$($(DEV_PYTHON) -c "import sys; print(sys.executable)") \
	    -Dpybind11_DIR=$$($(DEV_PYTHON) -m pybind11 --cmakedir) >$(DEV_BUILD)/configure.log \
	    || { cat $(DEV_BUILD)/configure.log; exit 1; }; \
	  ninja -C $(DEV_BUILD) -j$(JOBS)'

clean:
	rm -rf build dist $(VENV) wgpt/_C.*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
