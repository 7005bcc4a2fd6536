# Two commands do all set-up on a fresh machine: `make demo` and `make test`.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Inductor's C++ compiles dominate the tests: one process a core, one thread each.
WORKERS ?= 2
TEST_ENV := OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 TOKENIZERS_PARALLELISM=false
PYTEST := $(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.PHONY: demo test test-all test-support test-slow-share lint docs release-check compat

demo: $(READY)
	$(BIN)/luvc-fx demo

# What a change can break: all but the tests marked slow, and the docstrings' examples.
test: lint
	$(PYTEST)

test-all: lint
	LUVC_HYPOTHESIS=full $(PYTEST) -m ""

# The oracle's tests of itself, which only a change of tests/support can break.
test-support: $(READY)
	$(PYTEST) -m "" tests/selftest

# For CI: the slow tests that are a commit's turn. tests/support/slow_share.py says how they are dealt out.
MINUTES ?= 25
COMMIT ?= $(shell git rev-parse HEAD)
test-slow-share: $(READY)
	LUVC_HYPOTHESIS=full $(PYTEST) -p tests.support.slow_share -m slow --commit $(COMMIT) --minutes $(MINUTES)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy -p luvc_fx
	$(BIN)/python -m docs.generated --check

# The pages of docs/ as HTML, in docs/_build/html.
docs: $(READY)
	$(BIN)/python -m sphinx -W -n --keep-going -q docs docs/_build/html

# Wheel and source distribution at work, each in a virtual environment of its own: minutes.
release-check: $(READY)
	$(BIN)/python -m tests.release.check

# Oldest and newest versions of torch and transformers, each pair in a virtual environment of its own: hours.
compat: $(READY)
	$(BIN)/python -m tests.compat.check
	$(BIN)/python -m docs.generated --write

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test,docs]"
	touch $@
