# make distill   from nothing to a distilled, measured, registered 4-step model
# make test      everything that is promised, checked
# make serve     the bundled student behind HTTP: page, API, OpenAI's client (serve/config.yaml)
# make ui        the MLflow pages of what was run        make stop   end the local Ray node
# make chaos     what is promised of machines that die, for ten minutes
# make lint      ruff       make types   mypy and declared dependencies       make docs   the documentation, in site/
# make help      all of them

PYTHON ?= python3
VENV   := .venv
BIN    := $(CURDIR)/$(VENV)/bin
CPUS   := $(shell nproc 2>/dev/null || sysctl -n hw.ncpu)
# Two logical CPUs more than there are: the data pipeline works beside a trainer that holds the real ones.
SLOTS  := $(shell echo $$(( $(CPUS) + 2 )))
ARGS   ?=
CONFIG ?= serve/config.yaml
SUBMIT  = ray job submit --runtime-env-json '{"env_vars": {"FEWSTEP_HOME": "$(CURDIR)"}}' --

export PATH := $(BIN):$(PATH)
export RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S ?= 120
export MLFLOW_DISABLE_TELEMETRY ?= true
export RAY_USAGE_STATS_ENABLED ?= 0
# The local node listens on loopback alone, and without a token: Ray 2.60's `ray start` turns tokens on as soon as
# one lies in ~/.ray, and its `ray job submit` then does not send it unless RAY_AUTH_MODE says so.
export RAY_AUTH_MODE ?= disabled

.PHONY: help setup node distill teacher serve test chaos lint types docs ui stop clean

help:
	@sed -n 's/^# make/make/p' Makefile

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml infra/constraints.txt platform/fewstep/__init__.py
	@echo "== setting up $(VENV) (once, some minutes)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check -c infra/constraints.txt -e '.[dev]'
	@touch $@

node: setup
	@ray status >/dev/null 2>&1 || { echo "== starting a local Ray node"; \
	  ray start --head --node-ip-address=127.0.0.1 --num-cpus=$(SLOTS) --disable-usage-stats >/dev/null; \
	  until ray job submit --no-wait -- true >/dev/null 2>&1; do sleep 1; done; }  # its job agent comes up last

distill: node
	$(SUBMIT) $(CURDIR)/jobs/distill_qwen.py $(ARGS)

teacher: node
	$(SUBMIT) $(CURDIR)/jobs/train_teacher.py $(ARGS)

serve: node
	@fewstep serve --detach --config $(CONFIG)

test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

chaos: setup
	$(BIN)/python -m pytest -m "" tests/chaos $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy
	$(BIN)/deptry platform serve jobs

docs: setup
	$(BIN)/mkdocs build --strict

ui: setup
	$(BIN)/mlflow ui --backend-store-uri sqlite:///mlflow.db

stop:
	ray stop

clean: stop
	rm -rf $(VENV) data runs out site mlartifacts mlflow.db .fewstep
