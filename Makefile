# Everything from a fresh clone: `make demo` (the main job) and `make test`.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
# torch is pinned for the set-up alone: this release has a build for CPUs everywhere
TORCH ?= torch==2.13.0

.PHONY: demo test fast check tutorials docs benchmarks clean

$(VENV)/ready: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --editable ".[test]"
	touch $@

demo: $(VENV)/ready  ## fit a VAE on scikit-learn's digits, print and draw its ELBO
	$(BIN)/python -m pyproelbo fit --out run/demo $(DEMO)

# On all cores; a test module stays in one process.
PYTEST := $(BIN)/python -m pytest -q -n auto --dist loadfile

test: $(VENV)/ready  ## the test suite and the doctests
	$(PYTEST) $(TEST)

fast: $(VENV)/ready  ## the tests that are not marked slow: most of them, in under two minutes
	$(PYTEST) -m "not slow" tests

check: $(VENV)/ready  ## lint, and types of the package and the tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/typed && mkdir -p build/typed
	cp -R pyproelbo build/typed/ && cp -R models guides build/typed/pyproelbo/
	$(BIN)/pyright --pythonpath $(BIN)/python

tutorials: $(VENV)/ready  ## execute the notebooks; of TUTORIALS="02 03" those alone
	$(BIN)/python tutorials/run.py $(TUTORIALS)

docs: $(VENV)/ready  ## the site, in build/docs: pages, notebooks, all names with their pictures
	MPLBACKEND=Agg $(BIN)/python -m sphinx -q -W --keep-going -c tutorials/site tutorials build/docs

benchmarks: $(VENV)/ready
	$(BIN)/python tests/benchmarks/step.py
	$(BIN)/python tests/benchmarks/aggregate.py
	$(BIN)/python tests/benchmarks/dmm.py

clean:
	rm -rf $(VENV) build dist *.egg-info
