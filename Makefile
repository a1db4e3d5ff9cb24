# Everything a newcomer types; `make` alone lists it.
#   make demo ARGS="pipeline=smoke"     other pipeline, or any override of it
#   make test ARGS="-k layers"          any option of pytest
#   make install PYTHON=python3.12      the interpreter that makes .venv (`make clean` first to change it)

PYTHON ?= python3
ARGS ?=

VENV := .venv
RUN := $(VENV)/bin/python
# -qq keeps pip's errors and drops its notices.
PIP := $(RUN) -m pip install -qq --disable-pip-version-check
TORCH := $(shell grep '^torch==' constraints.txt)
# Named after what was installed and where, so that a change of either installs again and nothing else does.
STAMP := $(VENV)/.installed-$(shell (pwd; cat pyproject.toml constraints.txt) | cksum | cut -d ' ' -f 1)

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all lint docs bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile

install: $(STAMP) ## make .venv and install the pinned versions into it, once

$(STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "The pinned versions need Python 3.11 or newer; say which, e.g. make install PYTHON=python3.12" >&2; exit 1; }
	@echo "[1/3] $(VENV), with $$($(PYTHON) --version)"
	@$(RUN) -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@echo "[2/3] $(TORCH), the largest download"
	@$(PIP) $(TORCH)
	@echo "[3/3] alignkit and what it needs, at the versions of constraints.txt (takes minutes)"
	@$(PIP) -c constraints.txt -e '.[dev,docs]'
	@rm -f $(VENV)/.installed-*
	@touch $@
	@echo "installed"

demo: install ## the whole pipeline on the embedded model: offline, no GPU; ends at the report
	@$(RUN) -m alignkit.pipeline pipeline=demo $(ARGS)

test: install ## the default tests
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n 2 $(ARGS)

test-all: install ## the default tests and the slow ones
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n 2 -m "not gpu" $(ARGS)

lint: install ## ruff, ruff format and mypy --strict; changes nothing
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy --strict src tests

docs: install ## the documentation site, into site/
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

bench: install ## every benchmark on this machine, one after the other
	@set -e; for script in $(sort $(wildcard benchmarks/*.py)); do echo "== $$script"; $(RUN) $$script; done

clean: ## remove .venv, builds and caches; runs/ stays
	rm -rf $(VENV) build dist site .mypy_cache .pytest_cache .ruff_cache
	find src tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2> /dev/null || true
