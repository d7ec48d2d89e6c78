# Everything a developer runs, and the only thing CI runs. Each target brings its own environment (.venv) up to date first.
# Needs make and Python 3.11 or newer; PYTHON=... names one, JOBS=... sets the number of test processes.

PYTHON ?= python3 python3.11 python3.12 python3.13 python3.14 python
JOBS ?= 2
TESTS ?= tests

PY := .venv/bin/python
STAMP := .venv/.made-from-pyproject-and-constraints
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export NO_MKDOCS_2_WARNING := 1

.DEFAULT_GOAL := help
.PHONY: help demo test check format bench docs new-method specimens clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /make \1\t/p' $(MAKEFILE_LIST) | expand -t 20

$(STAMP): pyproject.toml constraints.txt
	@python=; for p in $(PYTHON); do \
	  if "$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$$p; break; fi; done; \
	if [ -z "$$python" ]; then \
	  echo "Cutaway needs Python 3.11 or newer: none of '$(PYTHON)' is one; install it, or name it: make PYTHON=/path/to/python" >&2; exit 1; fi; \
	if ! "$$python" -c 'import ensurepip' 2>/dev/null; then \
	  echo "$$python cannot make virtual environments: install its venv package (Debian: python3-venv)" >&2; exit 1; fi; \
	echo "Setting up .venv with $$("$$python" --version)"; \
	"$$python" -m venv .venv
	@$(PY) -m pip install --quiet -c constraints.txt "$$(grep '^torch==' constraints.txt)" -e '.[dev]'
	@touch $@

demo: $(STAMP)  ## a first look: builds a report under out/demo/
	$(PY) -m cutaway.demo

test: $(STAMP)  ## all tests, offline (TESTS=tests/unit for some)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(PY) -m pytest -n $(JOBS) --dist worksteal $(TESTS)

check: $(STAMP)  ## format, lint, types, architecture, pinned versions, docs in step with the code
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(PY) -m pytest -q tests/unit/test_architecture.py
	$(PY) -m tools.check_pins
	$(PY) -m tools.check_docs
	$(PY) -m mkdocs build --strict --site-dir out/docs-check  # never --quiet: it hides warnings from --strict

format: $(STAMP)  ## format the code and mend what ruff can
	$(PY) -m ruff check --fix-only .
	$(PY) -m ruff format .

bench: $(STAMP)  ## run the speed benchmarks into benchmarks/results/ (ONLY=name for one)
	@set -e; found=; for script in benchmarks/speed/$(or $(ONLY),[a-z]*).py; do \
	  [ -f "$$script" ] || continue; found=1; echo "$$script"; OMP_NUM_THREADS=1 $(PY) "$$script"; done; \
	if [ -z "$$found" ]; then echo "no benchmark matches benchmarks/speed/$(or $(ONLY),[a-z]*).py" >&2; exit 1; fi

docs: $(STAMP)  ## write the generated parts of docs/, then build the pages into site/
	$(PY) -m tools.check_docs --write
	$(PY) -m mkdocs build --strict
	@echo "site/index.html"

new-method: $(STAMP)  ## start a method: NAME=my_method STAGE=see|locate|prove|change|follow
	@if [ -z "$(NAME)" ] || [ -z "$(STAGE)" ]; then \
	  echo "usage: make new-method NAME=my_method STAGE=see|locate|prove|change|follow" >&2; exit 2; fi
	$(PY) -m tools.new_method $(NAME) --stage $(STAGE)

specimens: $(STAMP)  ## train the embedded models again from their recipes
	$(PY) -m recipes.build_all

clean:  ## remove what was made, the environment included
	rm -rf .venv build dist site out/demo out/docs-check out/ci .ruff_cache .mypy_cache .pytest_cache src/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
