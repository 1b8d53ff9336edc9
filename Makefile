# Every target sets up what it needs, in its own virtual environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

OLDEST := .venv-oldest

.PHONY: quickstart test check docs package audit licences fuzz browser kernel oldest gpu gpu-wheels clean

quickstart: $(VENV)/.quickstart  ## distil a real model on real text, in minutes on a CPU
	$(BIN)/python -m srd_lightning.quickstart

test: $(VENV)/.dev  ## all tests that need no GPU
	$(BIN)/python -m pytest -m "not gpu and not kernel" --numprocesses 2 --dist loadfile --durations 25

check: $(VENV)/.dev  ## what a change must pass: style, types, the manual, tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(MAKE) licences
	$(MAKE) docs
	$(MAKE) test
	$(MAKE) kernel

docs: $(VENV)/.docs  ## the manual as a site, in site; python -m http.server --directory site shows it
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

browser: $(VENV)/.dev  ## the page of srd report in a browser; installs Chromium where it is not there (Debian)
	command -v chromium || (apt-get update && apt-get install --yes --no-install-recommends chromium)
	$(BIN)/python -m pytest -m browser

# Of NVIDIA's own licence is what torch for GPUs brings along; nothing of it is in the wheel.
licences: $(VENV)/.dev  ## no package that is installed has a licence beyond those in pyproject.toml
	$(BIN)/pip-licenses --ignore-packages srd-lightning \
		$$($(BIN)/python -m pip list --format freeze | sed -n 's/^\(nvidia-[^=]*\|cuda-[^=]*\)==.*/\1/p') > /dev/null

audit: $(VENV)/.dev  ## no version that the tests run with has a known vulnerability; asks a database on the network
	$(PYTHON) -m venv $(VENV)-audit
	$(VENV)-audit/bin/python -m pip install pip-audit
	$(VENV)-audit/bin/pip-audit --no-deps --disable-pip --requirement constraints.txt

package: $(VENV)/.dev  ## sdist and wheel into dist, and the wheel used in an empty environment; then docs/releasing.md
	$(BIN)/python tests/package.py

fuzz: $(VENV)/.dev  ## a million damaged files and settings, FUZZ=… for another number; goes on where it stopped
	$(BIN)/python tests/fuzz.py

kernel: $(VENV)/.dev $(VENV)/triton  ## the Triton kernel, on a CPU: run by Triton's interpreter, compiled for a GPU
	PYTHONPATH=$(VENV)/triton TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/test_kernel.py --numprocesses 2

oldest: $(OLDEST)/.dev  ## the tests with the oldest versions that are allowed
	$(OLDEST)/bin/python -m pytest -m "not gpu and not kernel" --numprocesses 2 --dist loadfile

gpu: $(VENV)/.dev $(VENV)/.liger  ## what needs a GPU: tests, and benchmarks; appends to results-gpu.jsonl
	$(BIN)/python benchmarks/gpu/run.py

gpu-wheels: $(VENV)/.dev  ## what a machine with a GPU lacks, if it reaches no package index: into .wheels
	$(BIN)/python benchmarks/gpu/pack.py $(if $(HAVE),--have $(HAVE))

clean:
	rm -rf $(VENV) $(OLDEST) $(VENV)-audit runs build dist site

# torch comes first, alone: later installs then keep it.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --constraint constraints.txt torch
	touch $@

$(VENV)/.%: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --constraint constraints.txt --editable ".[$*]"
	touch $@

# Beside the other packages, not among them: torch for CPUs is to find none, as where it is installed. Not among the
# constraints: torch for GPUs brings a version of its own.
$(VENV)/triton: Makefile
	$(BIN)/python -m pip install --target $@ --upgrade triton==3.9.0
	touch $@

$(OLDEST)/.dev: constraints-oldest.txt pyproject.toml
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --constraint constraints-oldest.txt --editable ".[lora,translation]" \
		pytest pytest-xdist hypothesis pyyaml hatchling
	touch $@
