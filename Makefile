# The two commands that the README promises are `make demo` and `make test`; each makes what it
# needs. PYTHON chooses the interpreter (3.11 or newer), VENV where the environment goes.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
DEMO_FLAGS ?=
TEST_FLAGS ?=

SOURCES := CMakeLists.txt README.md $(shell find src cpp -name '*.py' -o -name '*.?pp' -o -name '*.cu*')

.PHONY: help venv demo test lint types cpp pytest docs bench clean
help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

# One environment for everything, pinned. The package is installed as users install it, not as an
# editable: what runs is what ships. --no-build-isolation reuses the pinned build tools and the
# objects under build/, so only what changed is compiled.
$(VENV)/.python: requirements/constraints.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "rosakit needs Python 3.11 or newer: make PYTHON=/path/to/python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c requirements/constraints.txt -r requirements/dev.txt
	touch $@

$(VENV)/.rosakit: $(VENV)/.python $(SOURCES)
	$(BIN)/python -m pip install -q --no-build-isolation --no-deps --force-reinstall .
	touch $@

venv: $(VENV)/.rosakit  ## the environment with rosakit in it, for `. .venv/bin/activate`

demo: $(VENV)/.rosakit  ## window against window + ROSA on SmolLM2-135M, in minutes
	$(BIN)/python -m rosakit.demo $(DEMO_FLAGS)

test: lint types cpp pytest  ## everything that CI runs

lint: $(VENV)/.rosakit
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.rosakit
	$(BIN)/mypy

# The suite needs doctest (apt-get install doctest-dev); without it only the comparison with the
# definition runs, and says so.
cpp: $(VENV)/.python  ## build and run the tests of the C++ core
	$(BIN)/cmake -S . -B build/cpp -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
		-DROSAKIT_PYTHON=OFF -DROSAKIT_TESTS=ON
	$(BIN)/cmake --build build/cpp
	$(BIN)/ctest --test-dir build/cpp --output-on-failure

# Two processes of one thread each beat one process of two on small tensors.
pytest: $(VENV)/.rosakit
	OMP_NUM_THREADS=1 ROSAKIT_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(TEST_FLAGS)

docs: $(VENV)/.rosakit  ## build the documentation into site/
	$(BIN)/python -m pip install -q -c requirements/constraints.txt -r requirements/docs.txt
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(VENV)/.rosakit  ## CPU benchmarks, each case verified before it is timed
	$(BIN)/python -m benchmarks.cpu

clean:  ## remove what the targets made, not runs/
	rm -rf $(VENV) build site .mypy_cache .ruff_cache .pytest_cache
