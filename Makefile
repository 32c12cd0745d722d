# `make demo` and `make test` do all their own set-up: a Python >= 3.12, pip and make are enough.
SHELL := bash
VENV := .venv
PY := $(VENV)/bin/python
# A working uv is used when there is one; otherwise pip puts one into .uv, outside of any environment.
UV := $(shell uv --version >/dev/null 2>&1 && echo uv || echo .uv/bin/uv)
# The version that every figure in docs/ and benchmarks/ was measured with.
JAX := 0.11.2
HOST_PYTHON := $(shell command -v python3.12 || command -v python3 || echo python)

# A new environment holds no bytecode: let the first process that imports a module write it, wherever this is run from.
# Without it each of the hundred processes that the tests start parses JAX again (3 s of CPU).
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo test quick lint format constraints clean

setup: $(VENV)/.ready

.uv/bin/uv:
	$(HOST_PYTHON) -m pip install --quiet --target .uv uv

$(VENV)/.ready: pyproject.toml constraints.txt .python-version
	@$(UV) --version >/dev/null 2>&1 || $(MAKE) --no-print-directory .uv/bin/uv
	$(UV) venv --quiet --allow-existing --python "$$(cat .python-version)" $(VENV)
	$(UV) pip install --quiet --python $(PY) --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: setup ## train on real text over 8 simulated devices, be preempted, reshard, generate
	$(PY) examples/train_tiny.py

test: setup lint ## the whole suite, slow tests included
	$(PY) -m pytest -q -n 2 --dist loadfile --durations=25

quick: setup ## what one runs while editing
	$(PY) -m pytest -q -m "not slow" -x -n auto --dist loadfile

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports
	$(VENV)/bin/pyright

format: setup
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

constraints: ## pin the newest versions that resolve together (no registry host is written)
	@$(UV) --version >/dev/null 2>&1 || $(MAKE) --no-print-directory .uv/bin/uv
	echo 'jax==$(JAX)' | $(UV) pip compile --quiet --python-version 3.12 --universal --extra dev --no-header --no-annotate \
	  --no-emit-index-url --no-emit-find-links pyproject.toml - -o constraints.txt

clean:
	rm -rf $(VENV) .uv .pytest_cache .ruff_cache
