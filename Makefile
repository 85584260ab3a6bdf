# `make demo` runs both stages, `make test` the tests. Both create .venv if it is missing.

PYTHON ?= python3
BIN := .venv/bin
CACHE ?= cache/mini_ta
# Processes of `make test`. Tests wait for subprocesses, so there may be more than cores. With `worksteal`, most modules stay
# in one process, which makes their fixtures once.
JOBS ?= 3

.PHONY: demo test test-all lint clean

# Reinstalls only when what determines the installation changes: the kernel is compiled by it, beside its source.
.venv/installed: pyproject.toml setup.py pipeline/training/kernel.cpp
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "probsurgery needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	mkdir -p .venv/package && ln -sfn ../.. .venv/package/probsurgery # for mypy
	touch $@

demo: .venv/installed
	$(BIN)/probsurgery extract --arch mini --out $(CACHE)
	$(BIN)/probsurgery fit --cache $(CACHE)
	$(BIN)/probsurgery fit --cache $(CACHE) --optimizer joint
	$(BIN)/probsurgery fit --cache $(CACHE) --head surgery
	$(BIN)/probsurgery fit --cache $(CACHE) --head surgery --optimizer joint
	$(BIN)/probsurgery fit --cache $(CACHE) --head surgery --rank 128 --steps 5000
	$(BIN)/probsurgery fit --cache $(CACHE) --head ridge
	$(BIN)/probsurgery report --cache $(CACHE)

test: .venv/installed
	$(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal

# The tests that take minutes or a network too.
test-all: .venv/installed
	$(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal -m "slow or not slow"

lint: .venv/installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/lint-imports --no-cache && $(BIN)/mypy

clean:
	rm -f pipeline/training/_kernel_*.so
	rm -rf .venv .mypy_cache build dist *.egg-info
