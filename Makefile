# Git Re-Basin. `make` alone lists what can be made; everything happens in .venv (an existing one is used as it is).
PYTHON ?= python3
PIP_ARGS ?=
ARGS ?=
# Two UNets that were trained apart; ARGS take the place of all this.
DEMO := algo=learned_quick model.a=wide0 model.b=wide1 data.train=800 data.draws=4 data.batch_size=32 evaluate.points=11 threads=0
PY := .venv/bin/python
# Python compiles what it imports and keeps it, unless this is set; to compile everything is half of an installation.
unexport PYTHONDONTWRITEBYTECODE
PIP = $(PY) -m pip install --quiet --no-compile $(PIP_ARGS)

.DEFAULT_GOAL := help
.PHONY: help demo test lint style types site clean

help: ## show this help
	@echo "Git Re-Basin: align the neurons of two models, then merge them."
	@echo
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "The first call creates .venv with PYTHON=$(PYTHON) and installs the package there (about 1.6 GB);"
	@echo "PIP_ARGS='...' is passed to pip, ARGS='...' to the job or to pytest:"
	@echo "  make demo ARGS='model=mlp seed=1'"
	@echo "  make test ARGS='-k spec -x'"

demo: .venv/.installed ## learn maps between two diffusion models that were trained apart: some minutes (see outputs/)
	$(PY) -m rebasin.run $(or $(ARGS),$(DEMO))

test: .venv/.installed-dev ## run the tests, two files at a time; none may be left out but those that need CUDA
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder --no-skips $(ARGS)

lint: style types ## check style (ruff), which room imports which (import-linter) and types (pyright)

style: .venv/.installed-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	.venv/bin/lint-imports --no-cache

types: .venv/.installed-dev
	$(PY) -m pyright --pythonpath $(PY)

site: .venv/.installed-docs ## build the site into site/, strictly (the extra `docs` is installed on first use)
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet
	@echo "Open site/index.html"

clean: ## remove .venv, outputs and caches
	rm -rf .venv outputs multirun dist build site .cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than Python 3.11; name another one: make PYTHON=python3.11 ..." >&2; exit 1; }
	$(PYTHON) -m venv .venv
	@# An old pip takes twice as long to find out what fits together.
	$(PIP) 'pip>=25'

# Stamps: once installed, a call costs nothing until pyproject.toml changes.
.venv/.installed: pyproject.toml | .venv/bin/python
	@echo "Installing into .venv, about 1.6 GB; this takes some minutes once."
	$(PIP) -e .
	@touch $@

.venv/.installed-dev: pyproject.toml | .venv/bin/python
	@echo "Installing into .venv, about 1.6 GB; this takes some minutes once."
	@# torchvision breaks other imports where there is no CUDA, and image-reward wants an old timm: they lie aside, for
	@# the tests that ask for them (tests/aside.py).
	@rm -rf .venv/vision .venv/reward
	$(PIP) --no-deps --target .venv/vision 'torchvision>=0.26,<0.29' 'timm>=1.0' & vision=$$!; \
	$(PIP) --no-deps --target .venv/reward image-reward==1.5 timm==0.6.13 fairscale==0.4.13 & reward=$$!; \
	$(PIP) -e '.[dev]' && wait $$vision && wait $$reward
	@touch .venv/.installed $@

.venv/.installed-docs: pyproject.toml | .venv/.installed
	$(PIP) -e '.[docs]'
	@touch $@
