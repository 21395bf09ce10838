# My First LLM Experiment: every command of the course. `make help` lists them.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
RUN    := $(BIN)/python
# On Linux without an NVIDIA GPU, torch comes from PyTorch's CPU index: about 200 MB instead of gigabytes of CUDA packages.
TORCH_INDEX ?= $(shell if [ "$$(uname)" = Linux ] && ! command -v nvidia-smi >/dev/null 2>&1; then echo --extra-index-url https://download.pytorch.org/whl/cpu; fi)
TORCH  := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)

.DEFAULT_GOAL := help
.PHONY: help install course test test-fast test-alone lab refresh sweeps sweeps-check bench lock clean

help: ## list these commands
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | awk -F'\t' '{printf "  make %-13s %s\n", $$1, $$2}'

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "The course needs Python 3.11 or newer: run make PYTHON=python3.12 (or install it)."; exit 1; }
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	@echo "installing (about two minutes the first time)"
	@$(RUN) -m pip install --quiet --retries 1 --timeout 20 $(TORCH_INDEX) "$(TORCH)" 2>$(VENV)/torch.log || $(RUN) -m pip install --quiet "$(TORCH)"
	@$(RUN) -m pip install --quiet -c constraints.txt -e ".[test]"
	@touch $@

install: $(VENV)/installed ## make .venv with everything in it

course: install ## run the core course headless and print the scoreboard (FRESH=1: reuse nothing, neither runs nor the cached model)
	@$(RUN) -m course run $(if $(FRESH),--fresh)

test: install ## every test: unit tests, then nbval over every notebook
	@$(RUN) -m course test

test-fast: install ## the quick tests, for each commit (under a minute)
	@$(RUN) -m ruff check . && $(RUN) -m pytest -m "not slow" tests

test-alone: install ## each notebook by itself, with an empty runs/
	@$(RUN) -m course alone

lab: install ## open JupyterLab at the first notebook
	@$(BIN)/jupyter lab notebooks/00_start_here.ipynb

refresh: install ## re-execute the notebooks in place, in order, for committing
	@$(RUN) -m course refresh $(NOTEBOOK)

sweeps: install ## run and record what costs hours: data/results/*.json
	@$(RUN) -m course.sweeps run $(SWEEP)

sweeps-check: install ## re-run recorded points at random and compare
	@$(RUN) -m course.sweeps check

bench: install ## speed and memory, side by side in one run
	@$(RUN) benchmarks/training.py && $(RUN) benchmarks/evaluation.py && $(RUN) benchmarks/preference.py

lock: install ## write constraints.txt anew from what is installed
	@$(RUN) -m course lock

clean: ## remove the virtual environment, runs and caches of this folder (the user's cache stays)
	rm -rf $(VENV) runs .pytest_cache .ruff_cache .coverage* build *.egg-info
