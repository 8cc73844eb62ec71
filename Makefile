# `make demo` and `make test` do all the set-up on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: all demo test test-cluster lint format bench clean
all: $(VENV)/.installed

# The tested versions are in constraints.txt; on a machine with GPUs install the torch build for
# your CUDA version first (see docs/install.md), the constraint then holds the same release.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/deepfere demo -o demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest

# Real clusters on this machine: hosts in network namespaces (root, iproute2), Ray's dashboard, Slurm (root, slurm-wlm,
# munge), killed processes. What cannot be is skipped.
test-cluster: $(VENV)/.installed
	$(BIN)/python -m pytest -m cluster

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/fidelity.py --quick

clean:
	rm -rf $(VENV) build dist *.egg-info
