# `make demo` and `make test` set up everything they need in .venv (about 9 GB) and run; the second time they start at once.

PYTHON ?= $(firstword $(shell command -v python3.11 python3 2>/dev/null))
VENV := .venv
UV := $(VENV)/setup/bin/uv
RUN_UV := bash tools/uv.sh
READY := $(VENV)/.ready
BIN := $(VENV)/bin
RUN := $(BIN)/python -m
# All of tests/cluster carries the mark cluster. Left out before it is read: to read it imports SGLang, in each process.
FAST = $(BIN)/pytest -q -n 3 --ignore tests/cluster -m "not cluster and not thorough and not gpu"
ARGS ?=
TRACES ?=
MODEL ?=
SHELL := /bin/bash

# Where it is set, every process compiles all of SGLang and of the tests again (half a minute each).
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-gpu check fast format bench lock setup checked clean help

help:  ## what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 10

demo: $(READY)  ## the main job: model, cluster, a scripted conversation; stays up until Ctrl-C (ARGS=--once exits)
	@$(RUN) benchmarks.demo $(ARGS)

test: $(READY)  ## everything: lint, types, fast tests, then tests on real SGLang
	@$(MAKE) --no-print-directory check
	@$(BIN)/pytest -q -n 2 --ignore tests/cluster -m "thorough and not gpu" $(ARGS)
	@$(BIN)/mainstem model pull smollm2
	@$(BIN)/pytest -v --durations=10 -m "cluster and not gpu" $(ARGS)

test-gpu: $(READY)  ## what needs one GPU or two (MODEL=FOLDER: a model, or its config.json and tokenizer)
	@MAINSTEM_GPU_MODEL="$(abspath $(MODEL))" $(BIN)/pytest -v -m gpu $(if $(MODEL),,--ignore tests/gpu) $(ARGS)

check: $(READY)  ## lint, types and fast tests, in under two minutes
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(FAST) $(ARGS)

fast: $(READY)  ## the fast tests alone
	@$(FAST) $(ARGS)

format: $(READY)  ## lay the code out
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

bench: $(READY)  ## every benchmark of this machine, results as JSON (TRACES=DIR: also those that replay traces)
	@for name in boot ttft prediction delta scheduler_tick handoff handoff_loss handoff_faults handoff_fuzz index hot_prefix chaos chaos_scale rolling disconnect; do \
		$(RUN) benchmarks.$$name --json $(ARGS) || exit 1; done
	@test -z "$(TRACES)" || $(RUN) benchmarks.replay --suite "$(TRACES)" --json
	@test -z "$(TRACES)" || for name in index_faults split_stream against_round_robin; do \
		$(RUN) benchmarks.$$name "$(TRACES)" --json || exit 1; done

lock: $(UV)  ## renew requirements.lock from pyproject.toml
	@$(RUN_UV) pip compile pyproject.toml --extra dev --extra nixl --generate-hashes --no-emit-index-url --no-annotate --quiet \
		--python-version 3.11 --python-platform x86_64-manylinux_2_34 --custom-compile-command "make lock" -o requirements.lock

setup: $(READY)  ## only set up

clean:  ## remove what `setup` made
	rm -rf $(VENV) .mainstem

# Before anything is fetched, and again after a setup that did not come to its end.
checked:
	@test -e $(READY) || { bash tools/check-machine.sh "$(PYTHON)" && bash tools/check-disk.sh; }

$(UV): | checked
	@echo "setup 1/3: uv"
	@"$(PYTHON)" -m venv $(VENV)/setup
	@PIP_USER=0 $(VENV)/setup/bin/pip install --quiet --disable-pip-version-check --require-hashes --only-binary :all: -r tools/uv.lock

# The order matters: the virtual environment first, as it empties nothing that is there; the stamp last.
$(READY): requirements.lock pyproject.toml $(UV)
	@test -x $(BIN)/python || $(RUN_UV) venv --quiet --allow-existing --python "$$(command -v "$(PYTHON)")" $(VENV)
	@echo "setup 2/3: locked dependencies (SGLang, PyTorch; about 230 packages, about 9 GB, a few minutes)"
	@$(RUN_UV) pip sync --python $(BIN)/python --require-hashes requirements.lock
	@echo "setup 3/3: mainstem itself"
	@$(RUN_UV) pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@
