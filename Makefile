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
#                (2748 cases, two hours on a busy machine; ARGS="-k prepare" for one command)
#   make fuzz    what reads files of others, and the ops' checks of their arguments, with what
#                coverage leads to (SECONDS=120 a target; FUZZ="json ops" for some)
#   make lock    renew the pins and hashes of all that build, test and demo install
#   make sbom    what is installed, as a CycloneDX bill of materials: build/sbom.json
#   make bench   the CPU benchmarks
#   make gpu     on a machine with a GPU: build, test, benchmark (DRY=1: the same path without one)
#   make dev     compile wgpt/_C in the source tree for $(DEV_PYTHON), incrementally
PYTHON ?= python3
VENV ?= .venv
# What build, test, demo and CI install is pinned and hashed (requirements/), not what `pip install wgpt`
# takes: that has lower bounds. `make build LOCK=` takes what the package index has today.
LOCK ?= requirements/locked.txt
BY_HASH = --no-deps --require-hashes
# torch itself, where $(PYTHON) has none: by hash too, unless pip is configured to look elsewhere than
# in the common index, as for a build of torch without CUDA, which has other hashes.
TORCH ?= $(if $(shell $(PYTHON) -m pip config list 2>/dev/null | grep -E "(index-url|find-links)="), \
  torch==2.13.0,$(if $(LOCK),$(BY_HASH) -r requirements/torch.txt,torch==2.13.0))
JOBS ?= 2
# Compiling CUDA kernels for six architectures takes minutes: only where a GPU could run them, or
# where WGPT_CUDA says so. (A plain `pip install .` compiles them wherever nvcc is.)
WGPT_CUDA ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo AUTO || echo OFF)
ARGS ?=

VENV_PYTHON = $(abspath $(VENV))/bin/python
STAMP = $(VENV)/.wgpt-installed
SOURCES = $(shell find csrc wgpt build_backend -type f -not -name '*.so' -not -name '*.pyc') \
          CMakeLists.txt pyproject.toml

.PHONY: build test test-all check format sanitize emulated neon faults fuzz fuzz-ops lock sbom bench demo \
  study docs gpu dev clean

build: $(STAMP)

# torch is large: one in $(PYTHON)'s own environment is used if it is new enough.
HAS_TORCH = import sys, importlib.metadata as m; \
  new = tuple(map(int, m.version("torch").split(".")[:2])) >= (2, 10); sys.exit(not new)
IS_VENV = import sys; sys.exit(sys.prefix == sys.base_prefix)

$(VENV)/bin/python:
	if $(PYTHON) -c '$(HAS_TORCH)' 2>/dev/null && ! $(PYTHON) -c '$(IS_VENV)'; \
	then $(PYTHON) -m venv --system-site-packages $(VENV); else $(PYTHON) -m venv $(VENV); fi

REFUSED = { echo "make: make build LOCK= installs without pins; make lock pins anew"; exit 1; }
$(VENV)/.torch: $(LOCK) | $(VENV)/bin/python
	$(VENV_PYTHON) -c '$(HAS_TORCH)' 2>/dev/null || $(VENV_PYTHON) -m pip install --quiet $(TORCH)
	$(if $(LOCK),$(VENV_PYTHON) -m pip install --quiet $(BY_HASH) -r $(LOCK) || $(REFUSED))
	touch $@

$(STAMP): $(VENV)/.torch $(SOURCES)
	WGPT_CUDA=$(WGPT_CUDA) CMAKE_BUILD_PARALLEL_LEVEL=$(JOBS) $(VENV_PYTHON) -m pip install \
	  $(if $(LOCK),--no-deps --no-build-isolation .,".[test]")
	touch $@

# Plain `pytest`, not `python -m pytest`: the latter puts the source wgpt/, which has no _C, first.
# A file of tests stays in one process: its fixtures are made once.
test: build
	$(VENV)/bin/pytest -n $(JOBS) --dist loadfile $(ARGS)

test-all: build
	$(VENV)/bin/pytest -m "" $(ARGS)

# The tools need no build of wgpt; mypy sees torch.
$(VENV)/.tools: $(VENV)/.torch
	$(VENV_PYTHON) -m pip install --quiet $(if $(LOCK),$(BY_HASH) -r requirements/ci.txt || $(REFUSED), \
	  "ruff~=0.17.6" "mypy>=1.14" "clang-format~=23.1")
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
FUZZ ?= audio json tensors upload ops
FUZZ_OUT = build/fuzz
fuzz: build
	$(VENV_PYTHON) -m pip install --quiet "atheris>=3.0" "wgpt[serve]"
	for target in $(filter-out ops,$(FUZZ)); do \
	  $(VENV_PYTHON) tests/fuzz/run.py $$target $(SECONDS) || exit 1; done
	$(if $(filter ops,$(FUZZ)),if command -v clang++ >/dev/null; then $(MAKE) fuzz-ops; else \
	  echo "make: the target ops is left out: it needs clang++ (apt-get install clang)"; fi)

# The ops' own C++ (csrc/ops, csrc/checks.h) with libFuzzer's counters, AddressSanitizer and UBSan;
# kernels as they are. atheris brings a libFuzzer with the sanitizers' runtime, to be loaded first.
FUZZ_TORCH = $(shell $(VENV_PYTHON) -c \
  'import importlib.util as u; print(u.find_spec("torch").submodule_search_locations[0])')
FUZZ_OPS = $(patsubst csrc/ops/%.cpp,$(FUZZ_OUT)/%.o,$(wildcard csrc/ops/*.cpp))
$(FUZZ_OUT)/%.o: csrc/ops/%.cpp $(wildcard csrc/*.h csrc/ops/*.h csrc/kernels/*.h)
	@mkdir -p $(@D)
	clang++ -std=c++17 -O1 -g1 -fPIC -fvisibility=hidden -Icsrc -isystem $(FUZZ_TORCH)/include \
	  -DTORCH_TARGET_VERSION=0x020a000000000000 -fsanitize=fuzzer-no-link,address,undefined \
	  -fno-sanitize=vptr,function -fno-sanitize-recover=all -c $< -o $@

fuzz-ops: $(FUZZ_OPS)
	PATH="$(abspath $(VENV))/bin:$$PATH" sh -ec ' \
	  cmake -S . -B $(FUZZ_OUT)/kernels -G Ninja -DWGPT_CUDA=OFF -DWGPT_TORCH_DIR=$(FUZZ_TORCH) \
	    -DPython_EXECUTABLE=$(VENV_PYTHON) -Dpybind11_DIR=$$($(VENV_PYTHON) -m pybind11 --cmakedir); \
	  ninja -C $(FUZZ_OUT)/kernels -j$(JOBS)' >$(FUZZ_OUT)/kernels.log
	rm -rf $(FUZZ_OUT)/package && mkdir $(FUZZ_OUT)/package && cp -rs $(abspath wgpt) $(FUZZ_OUT)/package
	rm -f $(FUZZ_OUT)/package/wgpt/_C.*.so $(FUZZ_OUT)/package/wgpt/libwgpt_ops.*
	cp $(FUZZ_OUT)/kernels/_C.*.so $(FUZZ_OUT)/package/wgpt
	clang++ -shared $(FUZZ_OPS) -L$(FUZZ_TORCH)/lib -ltorch_cpu -Wl,-soname,libwgpt_ops.so \
	  $$(find $(FUZZ_OUT)/kernels -path "*wgpt_ops.dir*" -name "*.o" -not -path "*/csrc/ops/*") \
	  -o $(FUZZ_OUT)/package/wgpt/libwgpt_ops.so
	LD_PRELOAD=$$($(VENV_PYTHON) -c 'import atheris; print(atheris.path())')/asan_with_fuzzer.so \
	  ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 PYTHONPATH=$(FUZZ_OUT)/package \
	  $(VENV_PYTHON) tests/fuzz/run.py ops $(SECONDS)

faults: build
	WGPT_FAULTS_EVERY=1 $(VENV)/bin/pytest -m "" tests/faults $(ARGS)

# Two tools, in an environment of their own.
TOOLS = build/tools/bin
$(TOOLS)/uv:
	$(PYTHON) -m venv build/tools
	build/tools/bin/pip install --quiet uv cyclonedx-bom

# For every Python from 3.10 and every platform in one file. torch.txt comes first: what torch brings
# has the same versions in both. What of it is for GPUs alone stays out of locked.txt.
COMPILE = $(TOOLS)/uv pip compile --universal --python-version 3.10 --generate-hashes --no-annotate \
  --custom-compile-command "make lock" --quiet --upgrade
NOT_OF_TORCH = $$(sed -nE 's/^((torch|triton|nvidia|cuda)[a-z0-9-]*)==.*/--no-emit-package \1/p' \
  requirements/torch.txt | sort -u)
lock: $(TOOLS)/uv
	echo torch==2.13.0 | $(COMPILE) - -o requirements/torch.txt
	$(COMPILE) requirements/locked.in pyproject.toml --extra test \
	  --constraint requirements/torch.txt -o requirements/locked.txt $(NOT_OF_TORCH)
	$(COMPILE) pyproject.toml --extra test --extra serve --extra browser-test --extra tools-test \
	  --extra dev --constraint requirements/torch.txt \
	  --constraint requirements/locked.txt -o requirements/ci.txt $(NOT_OF_TORCH)
	$(COMPILE) pyproject.toml --extra sources-test --constraint requirements/torch.txt \
	  --constraint requirements/locked.txt --constraint requirements/ci.txt \
	  -o requirements/sources.txt $(NOT_OF_TORCH)
	printf "encodec\neinops\n" | $(COMPILE) --no-deps - -o requirements/encodec.txt
	printf "pesq\npocketsphinx\nresemblyzer\n" | $(COMPILE) --no-deps - -o requirements/metrics.txt

sbom: build $(TOOLS)/uv
	$(TOOLS)/cyclonedx-py environment $(VENV_PYTHON) --pyproject pyproject.toml -o build/sbom.json

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
	rm -rf build dist $(VENV) wgpt/_C.*.so wgpt/libwgpt_ops.*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
