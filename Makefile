# Two commands do all set-up on a fresh machine: `make demo` and `make test`.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Inductor's C++ compiles dominate the tests: one process a core, one thread each.
WORKERS ?= 2
TEST_ENV := OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 TOKENIZERS_PARALLELISM=false

.PHONY: demo test lint docs

demo: $(READY)
	$(BIN)/luvc-fx demo

test: lint
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy -p luvc_fx
	$(BIN)/python -m docs.generated --check

# The pages of docs/ as HTML, in docs/_build/html.
docs: $(READY)
	$(BIN)/python -m sphinx -W -n --keep-going -q docs docs/_build/html

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test,docs]"
	touch $@
