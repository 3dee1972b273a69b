# `make demo` compresses a network, `make test` runs the tests; both make .venv where it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export PATH := $(CURDIR)/$(BIN):$(PATH)
# Many containers set it; every process would then compile all of torch anew, for seconds.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test check docs bench lock clean

demo: $(READY)
	dvc repro
	@pbkd report

test: $(READY)
	pytest

check: $(READY)
	ruff format --check .
	ruff check .
	mypy
	lint-imports

# The site, into build/site; a broken link or a docstring that cannot be read is an error.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict

# `make bench QUICK=--quick` takes minutes instead of an hour.
bench: $(READY)
	for name in planner blocks scaling overhead elastic; do python benchmarks/$$name.py $(QUICK) || exit 1; done

$(READY): requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 14) else "pbkd needs Python 3.11 to 3.13, this is %d.%d; run: make PYTHON=python3.12 ..." % v)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --python $(BIN)/python --quiet --require-hashes --no-deps -r requirements.lock
	$(BIN)/uv pip install --python $(BIN)/python --quiet --no-deps -e .
	touch $(READY)

# The set that is tested; `pyproject.toml` says what else may work.
lock: $(READY)
	$(BIN)/uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 --generate-hashes --no-emit-index-url --quiet --custom-compile-command 'make lock' -o requirements.lock

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build dist *.egg-info
