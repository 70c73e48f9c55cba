# Every target does its own set-up. `make help` lists them.
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -ec
.DEFAULT_GOAL := help

BIN := .venv/bin
PYTHON_IN_VENV := $(BIN)/python
PYTEST := $(PYTHON_IN_VENV) -m pytest
PYTEST_ARGS ?=
FUZZ_SEEDS ?= 10000
CONFORMANCE_ARGS ?=
MODELS_ARGS ?=
NATIVE_SOURCES = $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.hpp' -o -name '*.cu')

# vLLM: no usage reports, no look-ups on a model hub.
export VLLM_NO_USAGE_STATS := 1
export HF_HUB_OFFLINE := 1
# Where it is set, each of the many processes compiles all that it imports anew: vLLM takes twice
# the time to start.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help setup test lint format cuda-compile demo bench fuzz soak conformance models clean distclean

help: ## show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' \
		| expand -t 20

setup: ## virtual environment, pinned packages, native engine, small model
	@.ci/setup-env

test: lint ## linters and type checks, then the tests (20 minutes on 2 cores)
	$(PYTHON_IN_VENV) .ci/two_passes.py $(PYTEST_ARGS)

lint: setup ## ruff, mypy, clang-format; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(if $(NATIVE_SOURCES),$(BIN)/clang-format --dry-run --Werror $(NATIVE_SOURCES))

format: setup ## apply ruff's fixes and the formatters
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(if $(NATIVE_SOURCES),$(BIN)/clang-format -i $(NATIVE_SOURCES))

cuda-compile: setup ## compile what is for CUDA, where nvcc is, and report; needs no device
	$(PYTHON_IN_VENV) csrc/build.py --cuda build/cuda

demo: setup ## a real server under 32 streaming chats: pie against stock vLLM
	$(PYTHON_IN_VENV) -m benchmarks.demo

bench: setup ## the speed benchmarks; results under benchmarks/results (half an hour)
	$(PYTHON_IN_VENV) -m benchmarks.throughput
	$(PYTHON_IN_VENV) -m benchmarks.serving

fuzz: setup ## the seeded fuzz tests with FUZZ_SEEDS seeds (10000)
	PIE_FUZZ_SEEDS=$(FUZZ_SEEDS) $(PYTEST) -m fuzz --timeout=0 $(PYTEST_ARGS)

soak: setup ## the long tests of a server under load
	$(PYTEST) -m soak --timeout=3600 $(PYTEST_ARGS)

conformance: setup ## vLLM's own scheduler and cache tests, with pie in their place (8 minutes)
	$(PYTHON_IN_VENV) -m tests.conformance $(CONFORMANCE_ARGS)

models: setup ## small models of many families, with stock vLLM and with pie; writes docs/models.md
	$(PYTHON_IN_VENV) -m tests.models_sweep $(MODELS_ARGS)

clean: ## remove what builds and runs left, keep .venv
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .venv/.pie/native
	rm -rf pie_vllm/_native
	find csrc -name '*.o' -delete
	find csrc pie_vllm tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

distclean: clean ## remove .venv too
	rm -rf .venv
