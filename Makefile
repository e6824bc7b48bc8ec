# make run    install, compress the bundled reference checkpoint with the default recipe, print the before/after table
# make test   install and run the tests          make slow    the tests that take minutes
# make check  style of the code                  make bench   time and memory against their floors

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

.PHONY: install run test slow check bench clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -c constraints.txt torch==2.13.0
	$(BIN)/pip install -c constraints.txt -e .[dev]
	touch $@

run: install
	$(BIN)/compressor compress reference out/reference --overwrite

test: install
	$(BIN)/python -m pytest

slow: install
	$(BIN)/python -m pytest -m slow

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: install
	$(BIN)/python -m benchmarks.run

clean:
	rm -rf $(VENV) build dist out *.egg-info
