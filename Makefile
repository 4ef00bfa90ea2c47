# Two commands do everything, set-up included: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test test-all style quality bench clean

demo: $(READY)
	PATH="$(CURDIR)/$(BIN):$$PATH" bash recipes/demo/run.sh

# What covers every module and every stage once. test-all adds the tests marked slow: every crash point, every step of an
# interruption, large files, and long trainings.
test: $(READY)
	$(BIN)/python -m pytest -m "not slow"

test-all: $(READY)
	$(BIN)/python -m pytest

style: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

quality: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Long, and only as good as the machine is quiet; NANOGPT_DIR=... for nanoGPT's rows.
bench: $(READY)
	$(BIN)/python scripts/bench/run.py --write docs/benchmarks.md

# Made anew when the dependencies change. torch comes first and by itself, so that the tested version is taken before
# any other package asks for one; where an index offers a CPU build under that version, it is enough for everything here.
$(READY): setup.cfg constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip setuptools wheel
	$(BIN)/pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

clean:
	rm -rf .venv runs
