# Needs python3 (3.11 or newer) and nothing else. Every target works alone, and twice in a row.
# PYTHON=python3.12 picks the interpreter; another interpreter gets another environment.

NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
ifndef PYTHON
PYTHON := $(firstword $(foreach p,python3 python3.14 python3.13 python3.12 python3.11,\
  $(shell $(p) -c '$(NEW_ENOUGH)' 2>/dev/null && echo $(p))) python3)
endif
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d%d" % sys.version_info[:2])')
VENV ?= .venv
BIN := $(VENV)/bin
PARITY := .venv-parity
AOT ?= .venv-aot
AOT_MINUTES ?= 20
CONSTRAINTS := $(wildcard constraints-py$(VERSION).txt)
PIP_FLAGS := --quiet --quiet --disable-pip-version-check $(addprefix -c ,$(CONSTRAINTS))
WORKERS ?= 2

.PHONY: help demo test test-slow soak lint parity aot aot-install bench readme-tables readme-plots clean

help:
	@echo "make demo       install, fetch a small model, run batch inference over examples/"
	@echo "make test       install what tests need, run them"
	@echo "make test-slow  the tests of over ten seconds"
	@echo "make soak       a server under mixed load for 20 minutes (SOAK_SECONDS)"
	@echo "make lint       ruff, pyright, import contracts"
	@echo "make parity     against a live transformers, in an environment of its own"
	@echo "make aot        kernels compiled for TPUs and GPUs without one, in an environment of its own"
	@echo "make bench      against other engines, in environments of their own"
	@echo "make readme-tables  the README's numbers, from benchmarks/results"
	@echo "make readme-plots   its pictures"
	@echo "make clean      remove the environments"

# A stamp per dependency group: written when the group is installed, out of date when the
# interpreter, the constraints or pyproject.toml change. Another interpreter starts over.
STAMP := $(VENV)/stamp-$(VERSION)

$(STAMP): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c '$(NEW_ENOUGH)' || { echo "kvjax needs Python 3.11 or newer"; exit 1; }
	@echo "installing kvjax into $(VENV)"
	@$(PYTHON) -m venv $(if $(wildcard $(STAMP)),,--clear) $(VENV)
	@$(BIN)/python -m pip install $(PIP_FLAGS) --upgrade pip
	@$(BIN)/python -m pip install $(PIP_FLAGS) -e .
	@touch $@

$(STAMP)-%: $(STAMP)
	@echo "installing the $* group into $(VENV)"
	@$(BIN)/python -m pip install $(PIP_FLAGS) --group $*
	@touch $@

demo: $(STAMP)
	$(BIN)/python examples/demo.py

test: $(STAMP)-test
	$(BIN)/python -m pytest -q -n $(WORKERS) -m "not slow"

test-slow: $(STAMP)-test
	$(BIN)/python -m pytest -q -n $(WORKERS) -m "slow and not alone"
	$(BIN)/python -m pytest -q -n 0 -m alone

SOAK_SECONDS ?= 1200

soak: $(STAMP)-test
	KVJAX_SOAK_SECONDS=$(SOAK_SECONDS) $(BIN)/python -m pytest -q -s tests/serving/test_soak.py

lint: $(STAMP)-test $(STAMP)-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

# torch first and by its plain version: whatever build pip finds serves, and no option of ours may
# pull another one in.
PARITY_STAMP := $(PARITY)/stamp-$(VERSION)

$(PARITY_STAMP): pyproject.toml $(CONSTRAINTS)
	@echo "installing torch, transformers and kvjax into $(PARITY)"
	@$(PYTHON) -m venv $(if $(wildcard $(PARITY_STAMP)),,--clear) $(PARITY)
	@$(PARITY)/bin/python -m pip install $(PIP_FLAGS) --upgrade pip
	@$(PARITY)/bin/python -m pip install $(PIP_FLAGS) torch==2.13.0
	@$(PARITY)/bin/python -m pip install $(PIP_FLAGS) -e . transformers==5.23.0 accelerate==1.15.0
	@touch $@

parity: $(PARITY_STAMP)
	$(PARITY)/bin/python -m tests.parity.parity_check

# Neither libtpu's compiler nor CUDA's needs a device. What the installed jax has no compiler for is
# skipped, and said: CUDA wants Python 3.12. AOT_TARGETS=tests.aot.cuda compiles for that alone.
aot: aot-install
	$(AOT)/bin/python -m tests.aot --minutes $(AOT_MINUTES) $(AOT_TARGETS)

aot-install:
	@$(MAKE) --no-print-directory VENV=$(AOT) $(AOT)/stamp-$(VERSION)-aot

readme-tables: $(STAMP)
	$(BIN)/python -m kvjax.benchmarks.readme_tables README.md

PLOTS := docs/plots
SHOWN := first-token-shared-prefix reuse-quality-binding

readme-plots: $(STAMP)-test
	$(BIN)/kvjax bench report benchmarks/results/*.json* -o $(VENV)/report.html --png $(VENV)/plots
	@mkdir -p $(PLOTS)
	@for name in $(SHOWN); do cp $(VENV)/plots/$$name.png $(PLOTS)/; done

bench: $(STAMP)
	$(BIN)/kvjax bench engine

clean:
	rm -rf $(VENV) $(PARITY) $(AOT) .venv-aot-312 build *.egg-info
