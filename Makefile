# `make demo` and `make test` do all the set-up on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: all demo test test-long test-cluster lint format bench performance clean
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

# Two processes, each with a Ray session of its own: starting things is mostly waiting.
test: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 --dist loadfile

# Whole studies stage by stage, and runs one after another.
test-long: $(VENV)/.installed
	$(BIN)/python -m pytest -m long

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

# The generated parts of docs/performance.md, on a machine with nothing else to do. Peers have environments of their own:
# PEER_PYTHON (ratiopath==1.0.3, tiffslide, openslide-bin) and THYRA_PYTHON (thyra); without them their rows are left
# out. TILES is a slide whose JPEG tiles are used in place of painted ones. A must that is missed keeps no part from
# being written, and fails the target.
performance: $(VENV)/.installed
	missed=0; \
	$(BIN)/python benchmarks/ingest.py --write-docs $(if $(THYRA_PYTHON),--thyra-python $(THYRA_PYTHON)) || missed=1; \
	$(BIN)/python benchmarks/tiling.py --write-docs $(if $(PEER_PYTHON),--peer-python $(PEER_PYTHON)) \
		$(if $(TILES),--tiles $(TILES)) || missed=1; \
	$(BIN)/python benchmarks/pyramid.py --write-docs || missed=1; \
	exit $$missed

clean:
	rm -rf $(VENV) build dist *.egg-info
