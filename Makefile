# make bench: the main job. make test: all tests. Both create .venv on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc -type f) setup.py pyproject.toml
BENCH_ARGS ?=
# Whole files run side by side, in the order of tests/conftest.py: what a file's tests share is made once.
PYTEST_ARGS ?= --numprocesses=logical --maxprocesses=8 --dist=loadfile --no-loadscope-reorder

.PHONY: bench test report gpu-check speed speed-baselines fuzz sanitize gate lint docs build-matrix triton-matrix \
	wheel wheel-check clean

bench: $(VENV)/installed
	$(BIN)/python -m benchmarks celeba40 $(BENCH_ARGS)

# Workers and hundreds of programs import the same files: one compiles them for all.
test: export PYTHONDONTWRITEBYTECODE :=
test: $(VENV)/installed
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# Everything that can be measured of layers, and one page of it, results/report.html: make report BENCH_ARGS=--quick
REPORT := results/report
report: $(VENV)/installed
	$(BIN)/python -m benchmarks celeba40 $(BENCH_ARGS) --json $(REPORT)/celeba40.json --plot $(REPORT)/celeba40.png
	$(BIN)/python -m benchmarks sweep tasks $(BENCH_ARGS) --json $(REPORT)/tasks.json
	$(BIN)/python -m benchmarks sweep slab $(BENCH_ARGS) --json $(REPORT)/slab.json
	$(BIN)/python -m benchmarks layers mixed_8 $(BENCH_ARGS) --json $(REPORT)/mixed.json --plot $(REPORT)/mixed.png
	$(BIN)/python -m benchmarks report $(REPORT)/celeba40.json $(REPORT)/tasks.json $(REPORT)/slab.json $(REPORT)/mixed.json --markdown $(REPORT)/tables.md

# On a machine with a GPU, everything for real within ten minutes, then a verdict; a second call goes on where the first
# one stopped: make gpu-check GPU_CHECK_ARGS="--seconds=1200 --fresh"
gpu-check: $(VENV)/installed
	$(BIN)/python -m pytest tests/on_gpu tests/layers/test_batch_norm.py -q -n1 --maxschedchunk=1 --max-worker-restart=20 --device=auto --seconds=600 --record=results/gpu-check.jsonl $(GPU_CHECK_ARGS)

# Fails where a hot path takes more instructions than its baseline; and makes those of now the baseline of machines like
# this one. What a shared machine's time tells: python -m benchmarks compare A.json B.json
speed: $(VENV)/installed
	$(BIN)/python -m benchmarks.hot_paths

speed-baselines: $(VENV)/installed
	$(BIN)/python -m benchmarks.hot_paths --accept

# Random valid and hostile calls, before them 500 programs that drive models: make fuzz FUZZ_ARGS="--calls 10000 --seed 1 --seconds 300"
fuzz: $(VENV)/installed
	PYTHONPATH=tests $(BIN)/python -m fuzz --kind programs --calls 500 --seconds 600
	PYTHONPATH=tests $(BIN)/python -m fuzz $(FUZZ_ARGS)

# The CPU library under AddressSanitizer with UBSan, and under ThreadSanitizer.
sanitize: $(VENV)/installed
	$(BIN)/python tools/sanitize.py address
	$(BIN)/python tools/sanitize.py thread

# Compiles every kernel of the compile gate anew, for every kind of GPU; fails where the table in the repository differs.
gate: $(VENV)/installed
	$(BIN)/python -m benchmarks compiled-kernels --all
	git diff --exit-code --stat tools/compile_gate/compiled_kernels.csv

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The documentation site, build/site/index.html. It needs Python 3.11.
docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# Do the sources compile against the headers of these versions of PyTorch? Fetches 80 MB a version, once.
TORCHES ?= 2.10.0 2.11.0 2.12.0 2.13.0 installed
build-matrix: $(VENV)/installed
	$(BIN)/python tools/build_matrix.py $(TORCHES)

# Do the kernels compile within their plans' budgets, and does the launcher work, with these versions of Triton?
TRITONS ?= 3.6.0 3.7.0
triton-matrix: $(VENV)/installed
	$(BIN)/python tools/triton_matrix.py $(TRITONS)

# A wheel for every Python and every PyTorch from 2.10 on.
wheel: $(VENV)/installed
	$(BIN)/python -m pip wheel --no-build-isolation --no-deps --wheel-dir dist .

# The build uses the PyTorch of the environment rather than a second copy of its own.
$(VENV)/installed: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "setuptools>=77" wheel "torch>=2.10" numpy
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[dev]"
	touch $@

# The same wheel in a second environment that has another PyTorch: make wheel-check TORCH=2.13.0
TORCH ?= 2.13.0
wheel-check: wheel
	test -x $(VENV)-$(TORCH)/bin/python || $(PYTHON) -m venv $(VENV)-$(TORCH)
	$(VENV)-$(TORCH)/bin/python -m pip install --quiet torch==$(TORCH) numpy
	$(VENV)-$(TORCH)/bin/python -m pip install --quiet --no-deps --force-reinstall dist/*.whl
	cd tests && ../$(VENV)-$(TORCH)/bin/python -I smoke.py

clean:
	rm -rf $(VENV) $(VENV)-* build dist *.egg-info tsbn_kernels/_native.so tsbn_kernels/_cuda.so .pytest_cache .mypy_cache .ruff_cache .hypothesis results
