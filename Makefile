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

.PHONY: help setup serve test fuzz lint types format train-example gpu-check clean

help:  ## Show this list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: .venv/.installed  ## Install everything into .venv

# The stamp is written last: a failed or interrupted installation is tried again.
.venv/.installed: setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev,bench,parquet,otel,redis]'
	.venv/bin/python -m helm_engine.compile_kernels
	touch $@

serve: setup  ## Serve the example model and print a request to paste
	.venv/bin/helm-engine serve $(MODEL) --host $(HOST) --port $(PORT)

test: setup lint types  ## Run the linter, the type checker and all tests
	.venv/bin/python -m pytest

fuzz: setup  ## Throw thousands of odd requests at a server
	.venv/bin/python -m pytest tests/fuzz --hypothesis-profile=thorough

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

clean:  ## Remove caches and build outputs (.venv and trained models stay)
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
