# Two commands do everything, including the set-up: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test test-all style quality help-texts bench clean

demo: $(READY)
	PATH="$(CURDIR)/$(BIN):$$PATH" bash recipes/demo/run.sh

# What to run while you work: everything except the tests marked slow
test: $(READY)
	$(BIN)/python -m pytest -m "not slow"

# Every test: every step and crash point of the fault tests, real data, large models
test-all: $(READY)
	$(BIN)/python -m pytest

style: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

quality: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# After a setting of a stage was added or changed: the text of `rorchat sft --help`
help-texts: $(READY)
	$(BIN)/python scripts/write_help.py

# Takes long and needs a quiet machine; NANOGPT_DIR=... adds nanoGPT's rows
bench: $(READY)
	$(BIN)/python scripts/bench/run.py --write docs/benchmarks.md

# Rebuilt when the dependencies change. torch is installed first, so that the tested version is taken before any other
# package asks for one; a CPU build of that version is enough for everything here.
$(READY): setup.cfg constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip setuptools wheel
	$(BIN)/pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

clean:
	rm -rf .venv runs
