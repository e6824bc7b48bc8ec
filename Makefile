# make run    install, compress the bundled model with the default recipe, print the table
# make test   install and run the tests        make slow    the tests that take minutes
# make check  style, spelling, imports, docs   make bench   time and memory against their floors
# make docs   build the documentation into site/; a broken link fails
# make sweep  twelve recipes on the bundled model, with a plot in out/sweep/report.html
# make lanes  the tests twice more, with kernels of other processors: no vectors; MKL's portable ones
# make faults one test for each fault in docs/reliability.md
# make gate   compress the bundled model and hold its report against benchmarks/gate/baseline.json

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

.PHONY: install run sweep test slow lanes faults check docs gate bench clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -c constraints.txt torch==2.13.0
	$(BIN)/pip install -c constraints.txt -e .[dev]
	touch $@

run: install
	$(BIN)/compressor compress reference out/reference --overwrite

sweep: install
	$(BIN)/compressor sweep examples/sweep.yaml out/sweep

test: install
	$(PYTEST)

slow: install
	$(PYTEST) -m slow

lanes: install
	ATEN_CPU_CAPABILITY=default $(PYTEST)
	MKL_CBWR=COMPATIBLE $(PYTEST)

faults: install
	$(PYTEST) -m faults

check: install docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy
	$(BIN)/codespell

# The variable silences a notice about a next major version of mkdocs.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

gate: install
	$(BIN)/compressor compress reference out/ci -c ci --overwrite --quiet
	$(BIN)/compressor gate out/ci --baseline benchmarks/gate/baseline.json --limits benchmarks/gate/limits.yaml

bench: install
	$(BIN)/python -m benchmarks.run

clean:
	rm -rf $(VENV) build dist out site *.egg-info
