# Everything a developer types. `make help` lists it.
#
#   VENV      the virtual environment, created when absent      (default .venv)
#   PYTHON    the interpreter that creates it, 3.10 or newer    (default python3)
#   PIP_ARGS  more arguments for every pip install, e.g. an index of CPU builds of torch:
#             make quickstart PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
#   THREADS   of the CPU benchmark                              (default 1)
#   ONLY      the one part of `make gpu` to run: test, bench, tune or profile    (default all but tune and profile)

VENV     ?= .venv
PYTHON   ?= python3
PIP_ARGS ?=
THREADS  ?= 1

# Before PATH has the environment's own: an interpreter that may have a torch with CUDA, installed by others.
OUTSIDE := $(shell command -v $(PYTHON))
BIN     := $(abspath $(VENV))/bin
PIP     := $(BIN)/python -m pip --disable-pip-version-check install -qq $(PIP_ARGS)
export PATH := $(BIN):$(PATH)  # ninja is looked for there
SOURCES := setup.py $(shell find csrc -type f)
COMPILE := mkdir -p build; $(BIN)/python setup.py --quiet build_ext --inplace > build/log 2>&1 || { cat build/log; exit 1; }
# Stamps: what is done in this environment. A change of the right-hand side does it again.
BASE    := $(VENV)/.base
PACKAGE := $(VENV)/.package
BUILD   := $(VENV)/.build
TRAIN   := $(VENV)/.extra-train
BENCH   := $(VENV)/.extra-bench
TEST    := $(VENV)/.extra-test

.PHONY: help quickstart test bench bench-quick gpu lint build clean
.DEFAULT_GOAL := help
.NOTPARALLEL:

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1 \t/' | expand -t 13

quickstart: $(TRAIN) $(BUILD)  ## environment, build, and a sparse network against a dense one on real data
	@echo "== rigl train digits"
	@$(BIN)/rigl train digits

# The operators' tests on the narrower instruction sets run beside the suite, which keeps one core busy.
test: $(TEST) $(BUILD)  ## environment, build, and the whole test-suite
	@echo "== pytest, and beside it the operators' tests on every other instruction set"
	@mkdir -p build; $(BIN)/python tests/instruction_sets.py > build/instruction_sets.log 2>&1 & sets=$$!; \
	trap 'kill $$sets 2> /dev/null' INT TERM; \
	$(BIN)/python -m pytest; suite=$$?; \
	wait $$sets; others=$$?; cat build/instruction_sets.log; exit $$((suite | others))

bench: $(BENCH) $(BUILD)  ## time everything on the CPU against dense and other sparse layers: 15 minutes; writes bench/results
	@$(BIN)/python -m pytest bench/suites --record --threads $(THREADS)

bench-quick: $(BENCH) $(BUILD)  ## the most telling of these figures: a minute; writes runs/bench
	@$(BIN)/python -m pytest bench/suites --quick --threads $(THREADS)

# With the first interpreter whose torch sees a GPU, else the first that has torch; needs no environment then.
gpu:  ## on a GPU: build, tests, compute-sanitizer, benchmark (or ONLY=test, bench, tune, profile)
	@python=; for seen in 'torch.cuda.is_available()' 'True'; do \
	  for p in $(BIN)/python $(OUTSIDE); do \
	    test -n "$$python" || ! $$p -c "import sys, torch; sys.exit(not $$seen)" 2> /dev/null || python=$$p; \
	  done; done; \
	test -n "$$python" || { $(MAKE) --no-print-directory $(PACKAGE) && python=$(BIN)/python; } || exit; \
	echo "== $$python"; $$python -m bench.gpu_suite $(ONLY)

lint: $(TEST)  ## ruff, clang-format and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@find csrc -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh' \
	  | xargs $(BIN)/clang-format --dry-run --Werror
	@$(BIN)/mypy

build: $(PACKAGE) $(BUILD)  ## compile what changed

clean:  ## remove what was built, reports, and the environment
	rm -rf build dist runs sparse_kernels/*.so *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis $(VENV)
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BASE): requirements-dev.txt
	@echo "== environment in $(VENV): $$($(PYTHON) --version), torch (a few minutes, once)"
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed: make PYTHON=python3.12 ..." if sys.version_info < (3, 10) else 0)'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) --requirement requirements-dev.txt
	@touch $@

$(PACKAGE): pyproject.toml | $(BASE)
	@echo "== installing sparse-kernels, compiling its C++ part (a minute)"
	@$(PIP) --no-build-isolation --editable .
	@touch $@ $(BUILD)

$(BUILD): $(SOURCES) | $(PACKAGE)
	@echo "== compiling the C++ part"
	@$(COMPILE)
	@touch $@

# The package itself is there by now: these fetch only what the extras name.
$(TRAIN): $(PACKAGE)
	@echo "== libraries of the recipes: matplotlib, rich, scikit-learn, tqdm, tyro"
	@$(PIP) 'sparse-kernels[train]'
	@touch $@

$(BENCH): $(PACKAGE)
	@echo "== libraries of the benchmark: matplotlib, pytest-benchmark, rich, tyro"
	@$(PIP) 'sparse-kernels[bench]'
	@touch $@

$(TEST): $(PACKAGE)
	@echo "== tools: pytest, hypothesis, ruff, mypy, clang-format, and Triton unless torch brought one"
	@$(PIP) 'sparse-kernels[train,bench,test,dev]'
	@$(BIN)/python -c 'import triton' 2>/dev/null || $(PIP) 'triton==3.6.0' \
	  || echo "no Triton for this platform: the tests of GPU kernels are skipped"
	@touch $@ $(TRAIN) $(BENCH)
