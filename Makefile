# Every target does its own set-up: a virtual environment in .venv, torch first, then Antefix with tested versions.
PYTHON ?= python3
VENV ?= .venv
# What pip is told to install as torch. On Linux PyPI's own is the CUDA build, some GB. For another one give a wheel, or
# name and index: make demo TORCH='torch --index-url URL' (torch's own page has the URLs).
TORCH ?= torch
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow clients lint types docs check clean

help:  ## Say what there is
	@grep -hE '^[a-z-]+:.*## ' Makefile | awk -F ':.*## ' '{printf "make %-10s %s\n", $$1, $$2}'

demo: $(VENV)/.run  ## Train a prefix on our own data and show what it changes (minutes)
	$(BIN)/antefix demo
	@echo "  source $(BIN)/activate       first: the command antefix lives there"

test: $(VENV)/.dev  ## Run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m "not slow and not network"

test-slow: $(VENV)/.dev  ## Run the tests that take minutes each
	$(BIN)/python -m pytest -m slow

clients: $(VENV)/.dev  ## Ask the server as real clients do (the page needs Chromium on this machine)
	$(PIP) -e '.[clients]'
	$(BIN)/python -m pytest tests/clients -rs
	$(BIN)/python tests/clients/lm_eval_score.py

lint: $(VENV)/.dev  ## Style and errors a reader would trip over
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev  ## Check the types
	$(BIN)/mypy

docs: $(VENV)/.dev  ## Build the documentation into site/
	$(BIN)/typer antefix.cli utils docs --name antefix --title "Commands" --output docs/commands.md > /dev/null
	$(BIN)/python docs/generate_recipe_page.py > docs/recipe.md
	$(BIN)/mkdocs build --strict

check: lint types test docs  ## All of it

clean:  ## Remove what was built
	rm -rf $(VENV) site build dist .pytest_cache .mypy_cache .ruff_cache

$(VENV)/.run: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Antefix needs Python 3.11 or newer: make PYTHON=python3.12 ..."; exit 2; }
	@echo "setting up $(VENV) (once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) $(TORCH)
	@$(PIP) -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	@echo "adding the tools for development (once)"
	@$(PIP) -e '.[dev]'
	@touch $@
