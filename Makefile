# Every target sets up what is missing first.
SHELL := /bin/bash
PREFILL ?= 1
DECODE ?= 1
MODEL ?=
ARGS ?=
BENCH ?= handoff
SECONDS ?= 600
SEED ?= 1
JSON ?=
PY := .venv/bin/python

.PHONY: help setup up test unit chaos fuzz check format bench proto clean

help:           ## Show this list
	@grep -hE '^[a-z]+: .*##|^[a-z]+:  *##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12
	@echo; echo "make up PREFILL=2 DECODE=2 MODEL=/path/or/hub-id ARGS='--http 0.0.0.0:8000 -- --max-model-len 4096'"

setup:          ## Install everything into .venv
	@scripts/setup.sh

up: setup       ## Start a cluster on this machine; Ctrl-C ends it
	@.venv/bin/kvrelay up --prefill $(PREFILL) --decode $(DECODE) $(if $(MODEL),--model "$(MODEL)") $(ARGS)

test: setup     ## Run every test
	@$(PY) -m pytest tests/unit tests/integration tests/fault tests/e2e $(ARGS)

unit: setup     ## Run the unit tests
	@$(PY) -m pytest tests/unit $(ARGS)

chaos: setup    ## Break a cluster under load again and again: make chaos SECONDS=600 SEED=1 JSON=FILE
	@$(PY) -m tests.chaos --seconds $(SECONDS) --seed $(SEED) $(if $(JSON),--json "$(JSON)") $(ARGS)

fuzz: setup     ## Fuzz what reads the network, 5 minutes each: make fuzz SECONDS=300 ARGS='frames http_bodies'
	@$(PY) -m pip install --quiet -r requirements/fuzz.in
	@$(PY) -m tests.fuzz --seconds $(if $(filter file,$(origin SECONDS)),300,$(SECONDS)) $(ARGS)

check: setup    ## Format, lint, types, layers, scripts, stubs
	@scripts/check.sh

format: setup   ## Put the sources into shape
	@$(PY) -m ruff format . && $(PY) -m ruff check --fix .

bench: setup    ## Run one benchmark: make bench BENCH=handoff ARGS='--json FILE'
	@$(PY) -m bench.$(BENCH) $(ARGS)

proto: setup    ## Generate the stubs from protos/
	@scripts/proto.sh src

clean:          ## Remove what setup and tests made
	@rm -rf .venv build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
