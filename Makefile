# make repro   set-up, then the default study: five methods on a real model, a report
# make test    set-up, then the tests
# make test-all set-up, then the tests and those that take longer
# make demo    tiny random models through the whole pipeline (not a result)
# make ui      refill MLflow's database from results/, then open its server
# make bench   each fast path against its counterpart, ratios and figures in results/bench
# make faults  a tiny study killed, cut short and starved for an hour: nothing may be lost
# make study NAME=...   another study of experiments/studies
SHELL := /bin/bash
# The newest of the accepted versions that runs here; `make PYTHON=/path/to/python` names another one.
PYTHON ?= $(firstword $(shell for v in 3.13 3.12 3.11; do python$$v -c "" 2>/dev/null && echo python$$v; done) python3)
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export HF_HUB_DISABLE_TELEMETRY := 1
export DVC_NO_ANALYTICS := 1
export MLFLOW_DISABLE_TELEMETRY := true
export DO_NOT_TRACK := true

.PHONY: repro test test-all demo ui bench faults study setup clean-cells
.DEFAULT_GOAL := repro

setup: .venv/installed

.venv/installed: requirements.lock
	@$(PYTHON) -c "" 2>/dev/null || { echo "error: $(PYTHON) does not run: install Python 3.11, 3.12 or 3.13, or name one: make PYTHON=/path/to/python3.12"; exit 2; }
	@$(PYTHON) -c 'import platform, sys; (3, 11) <= sys.version_info[:2] <= (3, 13) or sys.exit("error: $(PYTHON) is Python " + platform.python_version() + ": Holdfast needs 3.11, 3.12 or 3.13; name one: make PYTHON=/path/to/python3.12")' || exit 2
	@echo "setting up .venv from requirements.lock (some minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@touch $@

repro: setup
	@$(MAKE) --no-print-directory study NAME=

# -k: a cell that fails is recorded and the others go on; the summary names it and the exit status tells
study: setup
	@python -m experiments pipeline --study "$(NAME)"
	@status=0; python -m experiments repro --study "$(NAME)" || status=$$?; \
	  python -m experiments pipeline --study "$(NAME)" && { python -m experiments track --study "$(NAME)" || status=$$?; \
	  python -m experiments summary --study "$(NAME)" && exit $$status; }

test-all: setup
	@python -m pytest -m ""

demo: setup
	@$(MAKE) --no-print-directory study NAME=demo

test: setup
	@ruff check --quiet . && ruff format --check --quiet .
	@python -m pytest

bench: setup
	@python -m experiments bench

faults: setup
	@python -m experiments faults

ui: setup
	@python -m experiments ui

clean-cells: setup
	@python -m experiments clean-cells
