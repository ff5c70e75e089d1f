# make repro   set-up, then the default study: five methods on a real model, a report
# make test    set-up, then the tests
# make test-all set-up, then the tests and those that take longer
# make demo    tiny random models through the whole pipeline (not a result)
# make ui      refill MLflow's database from results/, then its dashboard
# make bench   each fast path against its counterpart, ratios and figures in results/bench
# make study NAME=...   another study of experiments/studies
SHELL := /bin/bash
PYTHON ?= python3.11
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export HF_HUB_DISABLE_TELEMETRY := 1
export DVC_NO_ANALYTICS := 1
export MLFLOW_DISABLE_TELEMETRY := true
export DO_NOT_TRACK := true

.PHONY: repro test test-all demo ui bench study setup clean-cells
.DEFAULT_GOAL := repro

setup: .venv/installed

.venv/installed: requirements.lock
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found: install Python 3.11, or name it: make PYTHON=python3"; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { echo "error: $(PYTHON) is not Python 3.11: make PYTHON=/path/to/python3.11"; exit 2; }
	@echo "setting up .venv from requirements.lock (some minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@touch $@

repro: setup
	@$(MAKE) --no-print-directory study NAME=

# -k: a cell that fails is recorded and the others go on; the summary names it and the exit status tells
study: setup
	@python -m experiments pipeline --study "$(NAME)"
	@status=0; dvc repro -k $(if $(NAME),experiments/studies/$(NAME)/dvc.yaml,dvc.yaml) || status=$$?; \
	  python -m experiments pipeline --study "$(NAME)" && python -m experiments track --study "$(NAME)" && python -m experiments summary --study "$(NAME)" && exit $$status

test-all: setup
	@python -m pytest -m ""

demo: setup
	@$(MAKE) --no-print-directory study NAME=demo

test: setup
	@ruff check --quiet . && ruff format --check --quiet .
	@python -m pytest

bench: setup
	@python -m experiments bench

ui: setup
	@python -m experiments track
	@mlflow ui --backend-store-uri sqlite:///mlflow.db

clean-cells: setup
	@python -m experiments clean-cells
