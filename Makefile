# HELM Engine: everything a developer or a user needs, from a fresh clone on.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
# The Python of gpu-check. Name another one (RUN_PYTHON=python3) on a machine whose own Python
# already has torch and the other requirements: then nothing is installed.
RUN_PYTHON ?= .venv/bin/python

MODEL := examples/models/hstu-ml-100k
HOST ?= 127.0.0.1
PORT ?= 8000

.PHONY: help setup serve test fuzz fuzz-pool compat lint types format train-example gpu-check clean

help:  ## Show this list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: .venv/.installed  ## Install everything into .venv

# The stamp is written last: a failed or interrupted installation is tried again.
.venv/.installed: setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev,bench,parquet,otel,redis,train,ray,gpu]'
	.venv/bin/python -m helm_engine.compile_kernels
	touch $@

serve: setup  ## Serve the example model and print a request to paste
	.venv/bin/helm-engine serve $(MODEL) --host $(HOST) --port $(PORT)

test: setup lint types  ## Run the linter, the type checker and all tests
	.venv/bin/python -m pytest

fuzz: setup  ## Throw thousands of odd requests at a server
	.venv/bin/python -m pytest tests/fuzz --hypothesis-profile=thorough

fuzz-pool: setup  ## Move pages at random, a million steps against a naive model
	.venv/bin/python benchmarks/pool_machine.py --json benchmarks/results/pool_machine.json
	.venv/bin/python -m pytest tests/helm_engine/test_moving_boundary.py --hypothesis-profile=thorough

compat: .venv-compat/.installed .compat/vllm-0.32.0.tar.gz  ## Run vLLM's own tests on our block pool
	PYTHONPATH=$(CURDIR) OMP_NUM_THREADS=1 .venv-compat/bin/python tests/compat/run.py \
	  --sdist .compat/vllm-0.32.0.tar.gz --json .compat/compat.json

.venv-compat/.installed: $(wildcard tests/compat/requirements*.txt)
	$(PYTHON) -m venv .venv-compat
	.venv-compat/bin/python -m pip install --disable-pip-version-check -r tests/compat/requirements.txt
	.venv-compat/bin/python -m pip install --disable-pip-version-check --no-deps -r tests/compat/requirements-vllm.txt
	touch $@

# The two variables let its setup.py say its name without looking for a compiler of GPU code.
.compat/vllm-0.32.0.tar.gz: .venv-compat/.installed tests/compat/requirements-sdist.txt
	VLLM_TARGET_DEVICE=empty VLLM_VERSION_OVERRIDE=0.32.0 \
	  .venv-compat/bin/python -m pip download --disable-pip-version-check --no-deps --no-binary vllm \
	  --no-build-isolation --require-hashes -r tests/compat/requirements-sdist.txt --dest .compat
	touch $@

lint: setup  ## Check style and formatting
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

types: setup  ## Check types
	.venv/bin/mypy

format: setup  ## Format the code and mend what the linter can mend
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

train-example: setup  ## Train the example model anew
	.venv/bin/python -m examples.train_hstu_ml100k --output $(MODEL)

gpu-check: $(if $(filter .venv/bin/python,$(RUN_PYTHON)),setup)  ## Check the engine on the GPU of this machine
	$(RUN_PYTHON) -m benchmarks.gpu_check

clean:  ## Remove caches and build outputs (environments and trained models stay)
	rm -rf build dist .compat *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv*/*' -prune -exec rm -rf {} +
