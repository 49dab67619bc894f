# Every target installs what it needs: on a fresh machine `make sweep` and `make test` are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
MINIMUM := .venv-minimum

.DEFAULT_GOAL := help
.PHONY: help setup sweep plan compare report test test-slow test-faults test-minimum lint docs bench experiments real calibration scan base clean

help: ## print this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(READY) ## virtual environment in .venv, versions pinned by constraints.txt

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	@touch $(READY)

sweep: $(READY) ## does LoRA on lm_head help? 30 runs on the embedded base, verdicts, table and a page
	$(BIN)/lorabench train -m experiment=lm_head
	$(BIN)/lorabench compare outputs/lm_head
	$(BIN)/lorabench report outputs/lm_head

plan: $(READY) ## what `make sweep` will do; trains nothing
	$(BIN)/lorabench plan -m experiment=lm_head

compare: $(READY) ## verdicts and table of `make sweep` again
	$(BIN)/lorabench compare outputs/lm_head

report: $(READY) ## the page of `make sweep` again
	$(BIN)/lorabench report outputs/lm_head

test: $(READY) ## the fast tests, minutes on two cores
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-slow: $(READY) ## the tests that take minutes
	$(BIN)/python -m pytest -m slow -n 2 --dist worksteal

test-faults: $(READY) ## kills, full disks, damaged files, dead servers, short memory: see docs/faults.md
	$(BIN)/python -m pytest -m faults -n 2 --dist worksteal

test-minimum: $(MINIMUM)/.ready ## the fast tests on the oldest versions that pyproject.toml allows
	$(MINIMUM)/bin/python -m pytest -n 2 --dist worksteal

$(MINIMUM)/.ready: pyproject.toml constraints-minimum.txt
	$(PYTHON) -m venv $(MINIMUM)
	$(MINIMUM)/bin/python -m pip install --quiet -c constraints-minimum.txt -e ".[dev]"
	@touch $@

lint: $(READY) ## ruff and mypy
	$(BIN)/ruff check lorabench hydra_plugins tests benchmarks
	$(BIN)/mypy

docs: $(READY) ## the generated pages of docs/
	$(BIN)/python -m lorabench.config.reference

bench: $(READY) ## the same sweeps packed, one by one, and by stock PEFT; about an hour
	$(BIN)/python benchmarks/sweep.py --threads 2 --repeats 3
	$(BIN)/python benchmarks/sweep.py --lengths --threads 2 --repeats 3

experiments: $(READY) ## every experiment on fresh seeds, written to docs/experiments.md; half an hour
	$(BIN)/python benchmarks/experiments.py

real: $(READY) ## a real model end to end (SmolLM2-135M from PyPI), into docs/experiments.md; half an hour
	$(BIN)/python benchmarks/real.py

calibration: $(READY) ## how often a verdict is false, in simulated commands; a quarter of an hour
	$(BIN)/python benchmarks/calibration.py

scan: $(READY) ## how the embedded question was chosen; about 20 minutes
	$(BIN)/python benchmarks/scan.py

base: $(READY) ## pretrain the embedded bases again; about ten minutes
	$(BIN)/python -m lorabench.zoo.recipe
	$(BIN)/python -m lorabench.zoo.recipe_bert

clean: ## remove .venv and caches; outputs/ stays
	rm -rf $(VENV) $(MINIMUM) .pytest_cache .mypy_cache .ruff_cache .hypothesis
