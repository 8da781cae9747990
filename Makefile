# Needs python3 (3.11 or newer) and make, and git for the pipeline; everything else goes into .venv.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
PYTHON ?= python3
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.PHONY: help venv demo check test soak lint bench generated

help:
	@echo "make demo       run the whole pipeline on the embedded digits; prints a table and the report's path"
	@echo "make check      ruff, mypy and the unit tests of tests/unit.txt, in less than a minute"
	@echo "make test       all tests but the soak"
	@echo "make soak       random kills and interleavings with full counts"
	@echo "make lint       ruff, mypy, snakemake --lint, snakefmt --check"
	@echo "make bench      benchmarks; prints ratios"
	@echo "make generated  write docs/parameters.md and the schema of params.yaml anew"
	@echo "make venv       only .venv, with the exact versions of requirements.txt"

venv:
	@$(PYTHON) scripts/environment.py

demo: venv
	@$(BIN)/python scripts/demo.py

check: venv
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(PYTEST) -q $$(cat tests/unit.txt)

test: venv
	$(PYTEST) -m "not soak" --numprocesses 3 --dist loadfile --no-loadscope-reorder

soak: venv
	$(PYTEST) -m soak --timeout 7200

lint: venv
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/snakefmt --check Snakefile workflow
	$(BIN)/snakemake --lint

bench: venv
	@for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script; done

generated: venv
	$(BIN)/pipestill config --docs > docs/parameters.md
	$(BIN)/pipestill config --schema > workflow/schemas/params.schema.json
