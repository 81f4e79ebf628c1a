PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help dev demo test check format samples bench bench-full bench-rounding test-compat clean

help:  ## List what can be made
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable . --group dev
	touch $(READY)

dev: $(READY)  ## Set up the virtual environment

demo: $(READY)  ## Inspect, merge and verify sample checkpoints, into demo_output/
	$(BIN)/lora-merge inspect sample_checkpoints/pi0_tiny/2999 --lora-alpha paligemma=8,action_expert=2
	$(BIN)/lora-merge merge sample_checkpoints/pi0_tiny/2999 --lora-alpha paligemma=8,action_expert=2 \
	    -o demo_output/2999 --overwrite --report demo_output/merged.json --report demo_output/merged.md
	$(BIN)/lora-merge verify demo_output/2999 --against sample_checkpoints/pi0_tiny/2999 \
	    --lora-alpha paligemma=8,action_expert=2 --report demo_output/verified.html
	$(BIN)/lora-merge merge sample_checkpoints/llama_tiny/base --adapter sample_checkpoints/llama_tiny/adapter \
	    -o demo_output/llama --overwrite --verify

test: $(READY)  ## Run the tests
	$(BIN)/python -m pytest -n 2 $(TESTS)

check: $(READY)  ## Check format, lint, types and the direction of imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)  ## Format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

samples: $(READY)  ## Make sample_checkpoints/ anew
	$(BIN)/python sample_checkpoints/make.py

test-compat: $(READY)  ## Prove that OpenPI's pinned Orbax restores what is written, and that the tool runs beside it
	bash tests/compat/run.sh

CHOSEN = $(if $(CASES),--cases $(CASES)) $(if $(RUNS),--runs $(RUNS))

bench: $(READY)  ## Measure small merges beside a plain copy, in a minute or two
	$(BIN)/python benchmarks/run.py --size small $(CHOSEN)

bench-full: $(READY)  ## Measure full-size merges against their targets; CASES=llama,startup RUNS=3 for some; 40 GB of disk
	$(BIN)/python benchmarks/run.py --size full $(CHOSEN)

bench-rounding: $(READY)  ## Measure what each rounding keeps of a delta in bfloat16, in some minutes; QUICK=1 for a few small kernels
	$(BIN)/python benchmarks/rounding_table.py $(if $(QUICK),--quick)

clean:  ## Remove environments, caches and outputs
	rm -rf $(VENV) .venv-* demo_output benchmarks/data .mypy_cache .ruff_cache .pytest_cache
