# Everything a newcomer needs: `make demo` shows it, `make test` proves it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKERS ?= 2
SEEDS ?= 10000
FIRST ?= 0
JOBS ?= 2

.PHONY: demo test lint types unit sim simtest system faults bench scale soak fuzz fuzzapi build binary deb \
  packagetest lock format clean help

help:
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(STAMP) ## three daemons on this machine: a tour (ARGS=--once ends by itself)
	@$(BIN)/python -m tests.demo.tour $(ARGS)

test: lint types unit simtest system fuzzapi ## everything that must be green

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(STAMP)
	$(BIN)/mypy

unit: $(STAMP) ## without real daemons (OLLAMAD_FRESH=1: with new examples)
	$(BIN)/pytest -q -n $(WORKERS) tests/unit tests/test_imports.py

simtest: $(STAMP) ## a few hundred seeds of the simulator, and those that ever failed
	$(BIN)/pytest -q tests/sim

sim: $(STAMP) ## simulate consensus: make sim SEEDS=10000 (FIRST=0 JOBS=2)
	@$(BIN)/python -m tests.sim --seeds $(SEEDS) --first $(FIRST) --jobs $(JOBS)

system: $(STAMP) ## real daemons, the real model
	$(BIN)/pytest -q -n $(WORKERS) --dist loadfile --durations=12 tests/system

faults: $(STAMP) ## nodes killed, paused, cut off and restarted under load (SECONDS=120 each)
	OLLAMAD_FAULT_SECONDS=$(or $(SECONDS),120) $(BIN)/pytest -q -rP tests/system/test_consensus_*.py \
	  tests/system/test_disk_faults.py
	OLLAMAD_FAULT_SECONDS=$(or $(SECONDS),120) $(BIN)/pytest -q -rP tests/system/test_streams.py
	OLLAMAD_SWARM_KILLS=$(or $(KILLS),50) $(BIN)/pytest -q -rP tests/system/test_swarm_faults.py

bench: $(STAMP) ## measure; prints ratios of things measured in the same run
	@$(BIN)/python -c 'import libtorrent' 2>/dev/null || $(BIN)/pip install --quiet 'libtorrent>=2' || true
	@$(BIN)/python -m tests.bench

scale: $(STAMP) ## routing, admission and heartbeats of 10 to 1,000 nodes on virtual time; draws docs/*.png
	@$(BIN)/python -c 'import matplotlib' 2>/dev/null || $(BIN)/pip install --quiet 'matplotlib>=3.9,<4'
	@nice $(BIN)/python -m tests.scale --plot docs

soak: $(STAMP) ## mixed load with random kills; looks for leaks (MINUTES=30)
	@$(BIN)/python -m tests.soak --minutes $(or $(MINUTES),30)

fuzz: $(STAMP) ## what reads foreign bytes: with atheris and schemathesis (SECONDS=60 for each target)
	@$(BIN)/python -c 'import atheris' 2>/dev/null || $(BIN)/pip install --quiet 'atheris>=3,<4'
	@nice $(BIN)/python -m tests.fuzz --seconds $(or $(SECONDS),60)
	@nice $(BIN)/python -m tests.fuzz.api --seconds $$((4 * $(or $(SECONDS),60)))

fuzzapi: $(STAMP) ## the API by its OpenAPI document, for a minute, always with the same seed
	@$(BIN)/python -m tests.fuzz.api --seconds 60 --seed 1

build: $(STAMP) ## the wheel, in dist/
	rm -rf dist
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .
	@ls dist

binary: ## the program in one file, dist/ollamad, with the list of its parts
	$(PYTHON) packaging/binary.py

deb: binary ## the Debian package, in dist/
	@command -v dh >/dev/null || { echo "debhelper is missing: apt install debhelper"; exit 1; }
	$(PYTHON) packaging/deb.py

packagetest: $(STAMP) ## the file and the package on bare Debian systems (root; debootstrap, systemd-container)
	$(BIN)/pytest -q -rs -n $(WORKERS) --dist loadfile tests/packaging

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock: ## resolve pyproject.toml anew into constraints.txt
	rm -rf $(VENV)/lock
	$(PYTHON) -m venv $(VENV)/lock
	$(VENV)/lock/bin/pip install --quiet --upgrade pip
	$(VENV)/lock/bin/pip install --quiet . --group dev
	( echo "# The exact versions that CI uses; made by 'make lock'."; \
	  $(VENV)/lock/bin/pip freeze --exclude ollama-distributed ) > constraints.txt
	rm -rf $(VENV)/lock

clean:
	rm -rf $(VENV) dist build .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "python3 is missing: apt install python3 python3-venv"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; choose one with: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || \
	  { echo "python3-venv is missing: apt install python3-venv"; exit 1; }
	@$(PYTHON) -c 'import ctypes; ctypes.CDLL("libgomp.so.1")' 2>/dev/null || \
	  { echo "libgomp is missing, which the engine needs: apt install libgomp1"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable . --group dev
	@touch $(STAMP)
