# Everything here sets up its own environment first, in .venv, and may be run again at any time.
#
#   make quickstart [CORPUS=folder] [RUN=name]    recordings in, a pretrained model and a report out
#   make test [ARGS="-k packing"]                 the tests
#   make lint                                     style checks
#   make setup [PYTHON=python3.12]                the environment alone

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Compiling all that is installed takes as long as installing it; Python compiles what it imports.
PIP_INSTALL := $(BIN)/python -m pip install --quiet --no-input --no-compile --disable-pip-version-check
# A CPU build is chosen where pip is offered one (PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS); else pip's default.
TORCH := torch==2.13.0

CORPUS ?=
RUN ?=
ARGS ?=

.PHONY: help setup quickstart test lint clean

help:
	@sed -n '3,6s/^# *//p' Makefile

setup: $(STAMP)

quickstart: $(STAMP)
	@$(BIN)/stepaudio run quickstart $(if $(CORPUS),'corpus=$(CORPUS)') $(if $(RUN),'run_dir=runs/$(RUN)')

test: $(STAMP)
	@$(BIN)/python -m pytest $(ARGS)

lint: $(STAMP)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

clean:
	rm -rf $(VENV)

# The stamp is written last, so that an interrupted set-up is done again.
$(STAMP): pyproject.toml tests/reference-packages.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "$(PYTHON) is missing or older than Python 3.10; type: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@if $(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then \
	  echo "[setup 1/3] environment in $(VENV), with the torch of $(PYTHON), which sees CUDA"; \
	  $(PYTHON) -m venv --system-site-packages $(VENV); \
	else \
	  echo "[setup 1/3] environment in $(VENV)"; \
	  $(PYTHON) -m venv $(VENV); \
	fi
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then \
	  echo "[setup 2/3] torch is there"; \
	else \
	  echo "[setup 2/3] installing $(TORCH)"; \
	  $(PIP_INSTALL) '$(TORCH)'; \
	fi
	@echo "[setup 3/3] installing stepaudio-train and what it needs"
	@$(PIP_INSTALL) -e '.[dev]'
	@$(PIP_INSTALL) --no-deps -r tests/reference-packages.txt
	@touch $@
	@echo "[setup] done; next time it is skipped"
