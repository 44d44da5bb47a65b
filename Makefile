# `make demo` and `make test` do all of their own set-up.
#
# The virtual environment in .venv has either the release build (demo, bench) or the development
# build with the test hooks (test). A stamp says which, and switching reinstalls incrementally.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
JOBS   ?= $(shell nproc)
export CMAKE_BUILD_PARALLEL_LEVEL ?= $(JOBS)
PIP    := $(BIN)/python -m pip --disable-pip-version-check -q

BUILD_NEEDS := pybind11 scikit-build-core cmake ninja nlohmann-json nvidia-cuda-runtime \
               nvidia-cuda-nvcc-cu12
RUN_NEEDS   := torch numpy safetensors rich typer matplotlib huggingface_hub accelerate msgpack \
               diffusers transformers
TEST_NEEDS  := pytest pytest-timeout pytest-xdist hypothesis ruff mypy clang-format peft bitsandbytes torchao \
               'jax; python_version >= "3.11"' 'flax; python_version >= "3.11"'
DOCS_NEEDS  := sphinx furo myst-parser sphinx-copybutton
DEEP_NEEDS  := clang-tidy gcovr coverage

NATIVE := $(wildcard $(shell git ls-files csrc cmake tests/native "*CMakeLists.txt" \
            "tests/simulated_driver/*.h" "tests/simulated_driver/*.cc" pyproject.toml 2>/dev/null))
LAYER  := $(wildcard $(shell git ls-files python 2>/dev/null))


.DEFAULT_GOAL := help
.PHONY: help demo readme report summary test test-deep check-perf fuzz lint native-tests python-tests test-matrix test-libraries test-serving test-architectures release release-lock release-check release-checklist docs-check test-aarch64 gpu-check gpu-rehearsal kernel-report bench bench-streams bench-env clean dev install-release

help:
	@printf '%s\n' \
	  'make demo            builds, loads a real model and a 2 GB one, compares with the reference' \
	  'make test            build, linters, C++ and Python tests, the simulated CUDA driver' \
	  'make test-deep       tests of minutes or hours: sanitizers, all versions, fuzzing' \
	  'make lint            ruff, mypy, clang-format' \
	  'make check-perf      instructions, system calls and allocations against their budgets' \
	  'make coverage        the lines that the tests do not reach' \
	  'make fuzz            the parsers under libFuzzer; FUZZ_SECONDS=60 for each target' \
	  'make test-libraries  the tests of diffusers, transformers, ... with the backends on' \
	  'make test-serving    vLLM and SGLang on the CPU; 3 GB to download' \
	  'make test-architectures  every model of transformers and diffusers, tiny, both ways' \
	  'make test-matrix     the tests with the versions that tests/matrix locks' \
	  'make gpu-check       tests and measurements on a machine with a GPU' \
	  'make gpu-rehearsal   the same here, on the simulated driver' \
	  'make bench           the benchmark, into build/bench-runs; then make summary report' \
	  'make bench-streams   models that run while they load, or in less memory than they have' \
	  'make summary         the summary of this machine, in benchmarks/results' \
	  'make report          its tables and pictures' \
	  'make release         sdist and wheels for every Python, x86-64 and aarch64, into dist' \
	  'make release-lock    the hashes of the packages that build a release' \
	  'make release-check   installs each wheel as a user would, and uses it' \
	  'make release-checklist  the checks before an upload' \
	  'make test-aarch64    native tests and loads on an emulated aarch64' \
	  'make docs            the documentation site, in build/docs' \
	  'make docs-check      checks that no page scrolls sideways at 360 pixels' \
	  'make clean           removes what the other targets made'

$(VENV)/.tools: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt $(BUILD_NEEDS) $(RUN_NEEDS)
	@touch $@

$(VENV)/.test-tools: $(VENV)/.tools
	$(PIP) install -c constraints.txt $(TEST_NEEDS)
	@touch $@

$(VENV)/.docs-tools: $(VENV)/.tools
	$(PIP) install -c constraints.txt $(DOCS_NEEDS)
	@touch $@

$(VENV)/.deep-tools: $(VENV)/.test-tools
	$(PIP) install -c constraints.txt $(DEEP_NEEDS)
	@touch $@

# From the distribution: googletest, strace (makes system calls fail) and xfsprogs (makes file
# systems).
$(VENV)/.gtest: $(VENV)/.tools
	@if [ ! -e /usr/include/gtest/gtest.h ] || ! command -v strace > /dev/null || ! command -v mkfs.xfs > /dev/null; then \
	  echo "installing libgtest-dev, strace, xfsprogs"; \
	  sudo=$$([ "$$(id -u)" = 0 ] || echo sudo); \
	  $$sudo apt-get update -qq && $$sudo apt-get install -y -qq libgtest-dev strace xfsprogs; \
	fi
	@touch $@

$(VENV)/.valgrind: $(VENV)/.gtest
	@if ! command -v valgrind > /dev/null; then \
	  echo "installing valgrind"; \
	  sudo=$$([ "$$(id -u)" = 0 ] || echo sudo); \
	  $$sudo apt-get update -qq && $$sudo apt-get install -y -qq valgrind; \
	fi
	@touch $@

# libFuzzer comes with clang.
$(VENV)/.clang: $(VENV)/.tools
	@if [ -z "$$(command -v clang++-14 clang++)" ]; then \
	  echo "installing clang-14"; \
	  sudo=$$([ "$$(id -u)" = 0 ] || echo sudo); \
	  $$sudo apt-get update -qq && $$sudo apt-get install -y -qq clang-14 libclang-rt-14-dev; \
	fi
	@touch $@

$(VENV)/.release: $(VENV)/.tools $(NATIVE) $(LAYER)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) install --no-build-isolation --no-deps --force-reinstall .
	@rm -f $(VENV)/.dev && touch $@

# An editable installation lists the modules by name, so a new module needs a new installation.
$(VENV)/.modules: FORCE | $(VENV)/.tools
	@git ls-files python | cmp -s - $@ || git ls-files python > $@
FORCE:

# Editable: Python files are used in place.
$(VENV)/.dev: $(VENV)/.test-tools $(VENV)/.gtest $(VENV)/.modules $(NATIVE)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) install --no-build-isolation --no-deps --force-reinstall \
	  -C build-dir=build/dev -C cmake.define.WEIGHTLIFT_TESTING=ON \
	  -C cmake.define.WEIGHTLIFT_WERROR=ON --editable .
	@rm -f $(VENV)/.release && touch $@

install-release: $(VENV)/.release
dev: $(VENV)/.dev

demo: install-release
	$(BIN)/python benchmarks/demo.py

bench: install-release bench-env
	$(BIN)/python benchmarks/run.py

bench-streams: install-release
	$(BIN)/python benchmarks/streams.py

# Each peer has its own environment, which falls back to the packages of the main one, so that torch
# is installed once.
PEERS := $(patsubst benchmarks/environments/%.txt,.bench/%/.installed,\
           $(wildcard benchmarks/environments/*.txt))
bench-env: $(PEERS)
.bench/%/.installed: benchmarks/environments/%.txt $(VENV)/.tools
	rm -rf .bench/$*
	$(BIN)/python -m venv --without-pip .bench/$*
	$(BIN)/python -c "import sysconfig as s; print(s.get_path('purelib'))" > \
	  $$(.bench/$*/bin/python -c "import sysconfig as s; print(s.get_path('purelib'))")/main.pth
	$(PIP) --python .bench/$*/bin/python install --only-binary :all: -r $< && touch $@ || \
	  echo "$* cannot be installed here: the benchmark leaves it out"

# Writes the summary of the machine and its kernel into benchmarks/results, from the runs in
# build/bench-runs.
summary: install-release
	$(BIN)/python benchmarks/summary.py

# Draws the summaries and writes their tables and the demo's output into README and RESULTS.md.
report: install-release
	$(BIN)/python benchmarks/report.py

readme: demo report

# The documentation site, in build/docs; a warning is an error.
.PHONY: docs
docs: $(VENV)/.docs-tools
	@[ -e $(VENV)/.dev ] || [ -e $(VENV)/.release ] || $(MAKE) install-release
	$(BIN)/python -m sphinx -W --keep-going -b html docs build/docs
	@echo "build/docs/index.html"

# Checks that no page scrolls sideways at 360 pixels. The browser comes from the distribution.
docs-check: docs
	@if [ -z "$$(command -v chromium google-chrome)" ]; then \
	  echo "installing chromium"; \
	  sudo=$$([ "$$(id -u)" = 0 ] || echo sudo); \
	  $$sudo apt-get update -qq && $$sudo apt-get install -y -qq --no-install-recommends chromium; \
	fi
	$(BIN)/python tests/narrow_pages.py

test: dev lint native-tests python-tests
	$(BIN)/python tests/perf/run.py --quick
	$(BIN)/python tests/simulated_driver/run_mutants.py --quick --passed

native-tests: dev
	$(BIN)/ctest --test-dir build/dev --output-on-failure -j $(JOBS)

# One process for each core, file by file. jax warns at each fork of its process, so its tests run
# in a separate one.
python-tests: dev
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --durations 10 -m "not gpu and not deep" \
	  --ignore=tests/python/models/test_flax.py
	$(BIN)/python -m pytest -m "not gpu and not deep" tests/python/models/test_flax.py

lint: $(VENV)/.test-tools
	$(BIN)/ruff check python tests benchmarks release
	$(BIN)/ruff format --check python tests benchmarks release
	$(BIN)/mypy
	$(BIN)/python tests/simulated_driver/run_mutants.py --check-list
	git ls-files 'csrc/*.h' 'csrc/*.cc' 'csrc/*.inl' 'csrc/*.cu' 'tests/*.h' 'tests/*.cc' | \
	  xargs $(BIN)/clang-format --dry-run --Werror

# Checks what the development build compiles; .clang-tidy selects the checks.
.PHONY: tidy asan tsan coverage
tidy: dev $(VENV)/.deep-tools
	$(BIN)/python -c "import json; print(*sorted({command['file'] \
	  for command in json.load(open('build/dev/compile_commands.json')) \
	  if command['file'].startswith('$(CURDIR)/csrc/')}), sep='\n')" | \
	  xargs -P $(JOBS) -n 1 $(BIN)/clang-tidy --quiet -p build/dev

# Runs the native tests, with the simulated driver, under ASan and UBSan, or under TSan. Leaves out
# the tests that need links to stay busy in real time, because instrumented code is too slow, and
# one whose forked child waits for ever: TSan's runtime does so if another thread allocates during
# the fork.
asan: SANITIZE := address,undefined
tsan: SANITIZE := thread
asan tsan: LEFT_OUT := ^LinkRate\.
tsan: LEFT_OUT := ^LinkRate\.|^PageChoice\.AChildDropsAWatch
asan tsan: $(VENV)/.test-tools $(VENV)/.gtest
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B build/$@ -G Ninja -DWEIGHTLIFT_SANITIZE=$(SANITIZE) \
	  -DCMAKE_BUILD_TYPE=RelWithDebInfo -DWEIGHTLIFT_TESTING=ON -DWEIGHTLIFT_WERROR=ON \
	  -DWEIGHTLIFT_PYTHON=OFF -DWEIGHTLIFT_CUDA=OFF -DPython_EXECUTABLE="$(CURDIR)/$(BIN)/python"
	$(BIN)/cmake --build build/$@
	$(BIN)/ctest --test-dir build/$@ --output-on-failure -j $(JOBS) -E '$(LEFT_OUT)'

# Coverage of the native and Python tests together; prints the lines that they do not reach.
coverage: $(VENV)/.gtest $(VENV)/.deep-tools
	$(BIN)/python tests/measure_coverage.py

test-deep: dev
	$(BIN)/python -m pytest -m "not gpu" --ignore=tests/python/models/test_flax.py
	$(BIN)/python -m pytest -m "not gpu" tests/python/models/test_flax.py
	WEIGHTLIFT_SEEDS=1000 $(BIN)/ctest --test-dir build/dev --output-on-failure -j $(JOBS)
	$(BIN)/python tests/simulated_driver/run_mutants.py --parallel $(JOBS) --record build/mutants.jsonl
	tests/pythons.sh
	$(MAKE) tidy asan tsan check-perf
	$(MAKE) test-libraries
	$(MAKE) test-serving
	$(MAKE) fuzz

# Compares the instructions, system calls and allocations of loads with the budgets.
check-perf: dev $(VENV)/.valgrind
	$(BIN)/python tests/perf/run.py

# Under ASan and UBSan, FUZZ_SECONDS for each target.
FUZZ_SECONDS ?= 60
fuzz: dev $(VENV)/.clang
	$(BIN)/python tests/fuzz/run.py --seconds $(FUZZ_SECONDS)
	for arm in kernel kernel_cuda_arm; do \
	  WEIGHTLIFT_KERNEL_SECONDS=$(FUZZ_SECONDS) build/dev/tests/native/$${arm}_test || exit 1; \
	done

# Runs the tests with each set of versions that tests/matrix/*.txt locks: `make test-matrix
# MATRIX="oldest newest"`.
test-matrix: dev
	tests/matrix/run.sh $(MATRIX)

# A real vLLM, and SGLang's loader, in their own environment.
test-serving: dev
	tests/serving/run.sh

# Runs the libraries' own tests with the backends off and on.
test-libraries: dev
	$(BIN)/python tests/libraries/run.py $(SUITES)

# Loads a tiny model of each architecture of transformers and diffusers by the library alone and
# with the backend: all pairs of options, or all combinations with FULL=1.
test-architectures: dev
	$(BIN)/python tests/libraries/architectures/run.py --jobs $(JOBS)

# Makes the sdist, the wheels, their SBOM and checksums from HEAD. Compilers and tools come from the
# index.
release:
	$(PYTHON) release/build.py --jobs $(JOBS) $(RELEASE)

# Locks the packages that build a release, with their hashes. Run it after a change of release/*.in
# or constraints.txt.
release-lock: $(VENV)/.tools
	$(PIP) install uv
	for name in builder tools; do \
	  $(BIN)/uv pip compile -q --universal --python-version 3.10 --generate-hashes --upgrade \
	    --no-annotate --custom-compile-command "make release-lock" -c constraints.txt \
	    release/$$name.in -o release/$$name.txt || exit 1; \
	done

# Installs as a user would: in clean environments without a compiler, also without root and on a
# read-only root. RELEASE_CHECK=--cpu-torch forbids the download of torch's CUDA build.
release-check:
	$(PYTHON) release/check.py $(RELEASE_CHECK)

# Uses the compiler of `make release`.
test-aarch64:
	@if [ ! -d build/release/tools ]; then $(MAKE) release; fi
	@if [ -z "$$(command -v qemu-aarch64 qemu-aarch64-static)" ] || [ ! -d /usr/src/googletest ]; then \
	  echo "installing qemu-user, libgtest-dev"; \
	  sudo=$$([ "$$(id -u)" = 0 ] || echo sudo); \
	  $$sudo apt-get update -qq && $$sudo apt-get install -y -qq qemu-user libgtest-dev; \
	fi
	$(PYTHON) tests/aarch64.py

release-checklist:
	$(PYTHON) release/checklist.py $(CHECKLIST)

# Writes the kernel's registers, spills and sizes by architecture into tests/KERNELS.md.
kernel-report: $(VENV)/.tools
	$(BIN)/python cmake/build_kernels.py --nvcc nvcc --include csrc --out build/kernel-report \
	  --ptxas "$$($(BIN)/python -c 'import glob, nvidia; print(*(f for p in nvidia.__path__ for f in glob.glob(p + "/cuda_nvcc/bin/ptxas")))')" \
	  --report tests/KERNELS.md csrc/convert/scatter.cu \
	  $$(sed -n 's/^set(WEIGHTLIFT_KERNEL_ARCHITECTURES "\([0-9;]*\)".*/\1/p' CMakeLists.txt | tr ';' ' ')

# For a machine with a GPU, offline, with the Python that it has: fifteen minutes in two commands,
# of which the first is the first look (tests/gpu_check/run.py --help). A skipped test is a failure.
gpu-check:
	$(PYTHON) tests/gpu_check/run.py $(GPU_CHECK)

# The whole GPU check on the simulated driver, with parts that hang and fail on purpose.
gpu-rehearsal: dev
	$(BIN)/python tests/gpu_check/run.py --rehearsal $(GPU_CHECK)

clean:
	rm -rf $(VENV) .bench build dist .demo
