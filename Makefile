# make distill   from nothing to a distilled, measured, registered 4-step model
# make test      what is promised, checked; make test-slow adds what takes minutes each
# make serve     the bundled student behind HTTP: page, API, OpenAI's client (serve/config.yaml)
# make ui        the MLflow pages of what was run        make stop   end the local Ray node
# make chaos     what is promised of machines, storage and MLflow that fail (docs/chaos.md)
# make clients   OpenAI's, LiteLLM's, Open WebUI's and MLflow's clients on the service; from the package registries
# make lint      ruff       make types   mypy and declared dependencies       make docs   the documentation, in site/
# make sbom      the bill of materials of an image, in out/       make audit   its packages against published advisories
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
# Serve starts a dead proxy again after three health checks that failed; by default they are 10 seconds apart.
export RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S ?= 1
# The local node listens on loopback alone, and without a token: Ray 2.60's `ray start` turns tokens on as soon as
# one lies in ~/.ray, and its `ray job submit` then does not send it unless RAY_AUTH_MODE says so.
export RAY_AUTH_MODE ?= disabled
# Ray takes --node-ip-address=127.0.0.1 for a slip on Linux and listens on the machine's own address instead, unless it
# is told, by this variable, that it can't be part of a cluster of several machines.
export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER ?= 0

.PHONY: help setup node distill teacher serve test test-slow chaos clients lint types docs ui sbom audit stop clean

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

test-slow: setup
	$(BIN)/python -m pytest -m slow -n 2 --dist loadfile $(ARGS)

chaos: setup
	$(BIN)/python -m pytest -m "" tests/chaos $(ARGS)

clients: setup
	PYTHON=$(BIN)/python tests/clients/run.sh

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

# Apart from .venv: it brings a validator of addresses that jsonschema, and so every process of Ray, would load at its
# start if it were there, which takes longer than all the rest of Ray (findings/ray_import_rfc3987.sh).
sbom: setup
	@mkdir -p out
	$(BIN)/uv tool run --from cyclonedx-bom==7.5.0 cyclonedx-py requirements infra/lock.txt --output-format JSON --output-file out/sbom.json

# Strict: without the network no package can be looked up, which must not look like "nothing found".
audit: setup
	@$(BIN)/pip-audit --strict --no-deps --disable-pip --progress-spinner off -r infra/lock.txt || { \
	  echo "error: advisories were found, or could not be asked for: see above, and run it where the network is open" >&2; \
	  exit 1; }

stop:
	ray stop

clean: stop
	rm -rf $(VENV) data runs out site mlartifacts mlflow.db .fewstep
