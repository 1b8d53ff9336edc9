# Every target sets up what it needs, in its own virtual environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: quickstart test check gpu clean

quickstart: $(VENV)/.quickstart  ## distil a real model on real text, in minutes on a CPU
	$(BIN)/python -m srd_lightning.quickstart

test: $(VENV)/.dev  ## all tests that need no GPU
	$(BIN)/python -m pytest -m "not gpu" --numprocesses 2 --dist loadgroup --durations 25

check: $(VENV)/.dev  ## what a change must pass: style, types, tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(MAKE) test

gpu: $(VENV)/.dev $(VENV)/.liger  ## what needs a GPU: tests, and benchmarks; writes results-gpu.json
	$(BIN)/python benchmarks/gpu/run.py

clean:
	rm -rf $(VENV) runs build dist

# torch comes first, alone: later installs then keep it.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --constraint constraints.txt torch
	touch $@

$(VENV)/.%: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --constraint constraints.txt --editable ".[$*]"
	touch $@
