# Two commands are all a newcomer needs: `make demo` and `make test`. Both set up `.venv` first.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
BIN := $(VENV)/bin
WORKERS ?= 3

TPU_VENV := .venv-tpu
TPU_STAMP := $(TPU_VENV)/.installed

.PHONY: help setup setup-tpu demo demo-llm test test-tpu lint pytest test-slow docs format clean

help:
	@echo "make demo       set up, then the main job end to end on simulated sessions (about 10 minutes)"
	@echo "make demo-llm   the demo's sentences rescored by a small language model (downloads 93 MB once)"
	@echo "make test       set up, then lint and tests"
	@echo "make test-tpu   install the TPU compiler (0.7 GB, no TPU needed) and compile for two kinds of TPU"
	@echo "make test-slow  the checks that take minutes"
	@echo "make lint       ruff, mypy, import rules"
	@echo "make docs       the documentation as a site in build/site"
	@echo "make format     format the code"
	@echo "make clean      remove .venv and caches; runs/ stays"

setup: $(STAMP)

$(STAMP): setup.cfg setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, found " + sys.version.split()[0] + ": make PYTHON=/path/to/python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing pinned packages into $(VENV) (about two minutes, 2 GB)"
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[lm,llm,wfst,dev]'
	@# Its own requirement, numpy below 2, is out of date.
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps pyctcdecode
	@touch $@

demo: setup
	$(BIN)/b2txt demo --out runs/demo

demo-llm: setup
	test -f runs/smollm2/rescoring.json || $(BIN)/lm-server prepare-llm --out runs/smollm2
	$(BIN)/python benchmarks/rescoring.py --llm runs/smollm2 --sentences 40 --dev 20 --per 0.14

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy b2txt_jax lm_server
	$(BIN)/lint-imports --no-cache
	$(BIN)/shellcheck launch/*.sh

# Side by side: mypy alone would leave a core idle.
test: setup
	@$(MAKE) --no-print-directory -j 2 lint pytest

# By file: what a file's tests share is made once. With bytecode: tests start a hundred processes.
pytest: setup
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations=15

# In an environment of its own: mkdocs has nothing to do with the packages.
docs:
	test -x .venv-docs/bin/mkdocs || { $(PYTHON) -m venv .venv-docs && .venv-docs/bin/pip install --quiet --disable-pip-version-check 'mkdocs-material==9.8.2' 'mkdocstrings[python]==1.0.8' 'mkdocstrings-python==2.0.11'; }
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --quiet
	@echo "open build/site/index.html"

test-slow: setup setup-tpu
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/slow
	OMP_NUM_THREADS=1 $(BIN)/pytest -m slow
	HYPOTHESIS_PROFILE=thorough OMP_NUM_THREADS=1 $(BIN)/pytest -m 'not slow' $$(grep -rl --include='*.py' '@given' tests)
	JAX_PLATFORMS=cpu OMP_NUM_THREADS=1 $(TPU_VENV)/bin/pytest tests/slow/test_compile_full_size.py

setup-tpu: $(TPU_STAMP)

$(TPU_STAMP): setup.cfg setup.py pyproject.toml constraints.txt
	test -x $(TPU_VENV)/bin/python || $(PYTHON) -m venv $(TPU_VENV)
	@echo "installing JAX with the TPU compiler into $(TPU_VENV)"
	$(TPU_VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[tpu]' \
		hypothesis pytest pytest-timeout pytest-xdist
	@touch $@

test-tpu: setup-tpu
	JAX_PLATFORMS=cpu OMP_NUM_THREADS=1 $(TPU_VENV)/bin/pytest -n $(WORKERS) --dist loadfile tests/tpu

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(TPU_VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
