# make quickstart   sets up .venv and trains a small language model by RLHF
# make test         sets up .venv and runs the default tests
#
# Needs Python >= 3.11 and make. PYTHON=/path/to/python chooses the interpreter.

PYTHON ?=
CANDIDATES = $(or $(PYTHON),python3 python3.12 python3.11 python3.13 python)
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-all lint format doctor docs clean

help:  ## what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

quickstart: .venv/installed  ## SFT, a reward model and PPO of a small model; a new run each time
	rm -rf runs/quickstart
	$(BIN)/python -m jaxrl_eff.main --config=configs/quickstart.py --workdir=runs/quickstart $(ARGS)

test: .venv/installed-dev  ## the default tests; ARGS="tests/core" chooses some
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

test-all: .venv/installed-dev  ## slow tests as well
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "slow or not slow" $(ARGS)

lint: .venv/installed-dev  ## what CI checks before the tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/installed-dev  ## lets ruff fix what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

doctor: .venv/installed  ## versions, devices, measured rates, what is missing
	$(BIN)/python -m jaxrl_eff doctor

docs: .venv/installed-dev  ## brings what is generated in README.md and docs/ up to date
	$(BIN)/python tests/test_readme.py

clean:  ## removes .venv, caches and build results; keeps runs/
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps are newer than pyproject.toml once the package is installed, so that a second call
# goes straight to work. The first interpreter that is new enough and can make a venv is taken.
.venv/bin/python:
	@for p in $(CANDIDATES); do \
	  if "$$p" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' \
	      >/dev/null 2>&1; then \
	    echo "making .venv with $$p ($$("$$p" --version 2>&1))"; \
	    exec "$$p" -m venv --clear .venv; \
	  fi; \
	done; \
	echo "error: none of these is Python 3.11 or newer with the venv module: $(CANDIDATES)" >&2; \
	echo "Install one (Debian and Ubuntu: python3 and python3-venv)," \
	  "or name it: make PYTHON=/path/to/python" >&2; \
	exit 1

.venv/installed: pyproject.toml | .venv/bin/python
	@echo "installing jaxrl_eff and what it needs into .venv"
	$(PIP) --editable .
	@touch $@

.venv/installed-dev: pyproject.toml | .venv/bin/python
	@echo "installing jaxrl_eff and what its tests need into .venv"
	$(PIP) --editable '.[dev]'
	@touch $@ .venv/installed
