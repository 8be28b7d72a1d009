# make bench: the main job. make test: all tests. Both create .venv on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc -type f) setup.py pyproject.toml
BENCH_ARGS ?=
PYTEST_ARGS ?=

.PHONY: bench test lint wheel clean

bench: $(VENV)/installed
	$(BIN)/python -m benchmarks celeba40 $(BENCH_ARGS)

test: $(VENV)/installed
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A wheel for every Python and every PyTorch from 2.10 on.
wheel: $(VENV)/installed
	$(BIN)/python -m pip wheel --no-build-isolation --no-deps --wheel-dir dist .

# The build uses the PyTorch of the environment rather than a second copy of its own.
$(VENV)/installed: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "setuptools>=77" wheel "torch>=2.10" numpy
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info tsbn_kernels/_native.so .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks results
