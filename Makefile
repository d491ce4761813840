# Everything from a fresh clone: `make demo` (the main job) and `make test`.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
# torch is pinned for the set-up alone: this release has a build for CPUs everywhere
TORCH ?= torch==2.13.0

.PHONY: demo test check tutorials benchmarks clean

$(VENV)/ready: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --editable ".[test]"
	touch $@

demo: $(VENV)/ready  ## fit a VAE on scikit-learn's digits, print and draw its ELBO
	$(BIN)/python -m pyproelbo fit --out run/demo $(DEMO)

test: $(VENV)/ready  ## the test suite and the doctests
	$(BIN)/python -m pytest -q $(TEST)

check: $(VENV)/ready  ## lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/typed && mkdir -p build/typed
	cp -R pyproelbo build/typed/ && cp -R models guides build/typed/pyproelbo/
	$(BIN)/pyright --pythonpath $(BIN)/python

tutorials: $(VENV)/ready  ## execute the notebooks; of TUTORIALS="02 03" those alone
	$(BIN)/python tutorials/run.py $(TUTORIALS)

benchmarks: $(VENV)/ready
	$(BIN)/python tests/benchmarks/step.py
	$(BIN)/python tests/benchmarks/aggregate.py
	$(BIN)/python tests/benchmarks/dmm.py

clean:
	rm -rf $(VENV) build dist *.egg-info
