# `make` lists the targets. Everything is installed into .venv, at the versions of requirements.lock.

VENV   ?= .venv
JOBS   ?= 2
PORT   ?= 8000
KILLS  ?= 100
# The first Python that is new enough; only asked for while there is no $(VENV).
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
            $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

BIN     := $(VENV)/bin
STAMP   := $(VENV)/.installed
# The workflow engine lives apart: its pins are not those that numbers are tied to.
ENGINE  := .venv-workflow
ENGINE_STAMP := $(ENGINE)/.installed
PIP     := -m pip --disable-pip-version-check --quiet
# One torch thread a worker.
PYTEST  := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q
PARALLEL := -n $(JOBS)

CHAPTERS := $(basename $(notdir $(sort $(wildcard book/chapters/*.md))))
# Another chapter every day, so that all have their turn: make test CHAPTER=pkt chooses one.
CHAPTER  ?= $(shell set -- $(CHAPTERS); shift $$(( $$(date +%s) / 86400 % $(words $(CHAPTERS)) )); echo $$1)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv workflow book serve test test-all browser lint bench drill readme lock clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "  PYTHON=python3.12   interpreter for a new environment (3.11 or newer)"
	@echo "  VENV=.venv          environment to use; VENV=\"\$$CONDA_PREFIX\" takes the active conda one"
	@echo "  JOBS=2              test processes"
	@echo "  CHAPTER=pkt         the chapter that \`make test\` executes"
	@echo "  RECORD=1            \`make bench\` also writes what the book's page on performance shows"
	@echo "  KILLS=100           kills of \`make drill\`; SEED=7 draws the moments of seed 7 again"

venv: $(STAMP) ## Make the environment (every target below does it when needed)

define environment
	@$(or $(PYTHON),false) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo 'kdrefs needs Python 3.11 or newer; "$(or $(PYTHON),python3)" is older or not there.' >&2; \
	  echo 'Name one with: make PYTHON=/path/to/python3.11 ...' >&2; exit 1; }
	@test -x $(1)/bin/pip || { echo "Making $(1) with $(PYTHON)"; $(PYTHON) -m venv $(1); }
endef

$(STAMP): requirements.lock pyproject.toml reproductions/pyproject.toml
	$(call environment,$(VENV))
	@echo "Installing requirements.lock into $(VENV) (the first time: about 6 GB on Linux, some minutes)"
	@$(BIN)/python $(PIP) install -r requirements.lock
	@$(BIN)/python $(PIP) install --no-deps --no-build-isolation -e . -e reproductions
	@touch $@

workflow: $(ENGINE_STAMP) ## Make .venv-workflow, the environment of the workflow engine

$(ENGINE_STAMP): workflow/requirements.lock
	$(call environment,$(ENGINE))
	@echo "Installing workflow/requirements.lock into $(ENGINE) (about 300 MB, half a minute)"
	@$(ENGINE)/bin/python $(PIP) install -r workflow/requirements.lock
	@touch $@

book: $(STAMP) ## Execute what changed and build the book into build/book/html
	@$(BIN)/python -m book.build

serve: book ## Build the book and show it on http://127.0.0.1:8000 (PORT=8000)
	@$(BIN)/python -m http.server --bind 127.0.0.1 --directory build/book/html $(PORT)

# Chapters as notebooks without outputs, executed with an empty run store: no failing cell hides behind a stored result.
CONVERT := import sys, nbformat; from pathlib import Path; from book.notebooks import convert; \
  [nbformat.write(convert(Path("book/chapters", f"{n}.md")), Path("build/nbval", f"{n}.ipynb")) for n in sys.argv[1:]]
define nbval
	@rm -rf build/nbval && mkdir -p build/nbval
	@$(BIN)/python -c '$(CONVERT)' $(1)
	@KDREFS_RUNS="$(CURDIR)/build/nbval/runs" $(PYTEST) -p no:xdist --nbval-lax $(1:%=build/nbval/%.ipynb)
endef

test: $(STAMP) $(ENGINE_STAMP) ## Run the tests without the slow ones, and one chapter's notebook
	@$(PYTEST) $(PARALLEL) -m "not slow and not browser and not network"
	$(call nbval,$(CHAPTER))

test-all: book $(ENGINE_STAMP) ## Run every test, every chapter's notebook and the browser tests
	@$(PYTEST) $(PARALLEL) -m "not browser and not network"
	$(call nbval,$(CHAPTERS))
	@$(PYTEST) -m browser

browser: book ## Open the built book in headless Chromium and check it
	@$(PYTEST) -m browser

lint: $(STAMP) ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/mypy

bench: $(STAMP) ## Run the benchmarks, print a table and write build/bench.json
	@$(BIN)/python -m tests.benchmarks $(if $(RECORD),--record)

drill: $(STAMP) ## Kill the programs at 100 random moments and count what is lost (some minutes)
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.drill --kills $(KILLS) $(if $(SEED),--seed $(SEED))

readme: $(STAMP) ## Write the table of verdicts into README.md
	@$(BIN)/python -m reproductions.readme

COMPILE := uv pip compile --universal --python-version 3.11 --quiet --no-header --no-annotate \
  --no-emit-index-url --no-emit-find-links
EXTRA := import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["workflow"], sep="\n")

lock: ## Re-make both requirements.lock (needs uv; UPGRADE=--upgrade takes newer versions)
	@command -v uv >/dev/null || { echo 'make lock needs uv on the PATH.' >&2; exit 1; }
	@printf 'setuptools>=77\nwheel\n' | $(COMPILE) pyproject.toml - --extra dev $(UPGRADE) -o requirements.lock
	@$(PYTHON) -c '$(EXTRA)' | $(COMPILE) - $(UPGRADE) -o workflow/requirements.lock

clean: ## Remove what was built, but neither the environment nor recorded runs
	@rm -rf build/book build/nbval build/workflow .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
	@find kdrefs reproductions book tests -name __pycache__ -type d -prune -exec rm -rf {} +
