# Every target creates .venv and installs what it needs; Python 3.11 or newer is all there must be.
# Not compiled at once, which takes a minute: of 15,000 files a fifth are ever imported.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed

# Modules are compiled when they are first imported, else every process imports torch from source.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo test soak lint bench clean

help:  ## Show what can be made
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable ".[test,lint]"
	touch $@

demo: $(STAMP)  ## Train, record and check a short run
	$(BIN)/thimble-zarr demo runs/demo.zarr --overwrite

test: $(STAMP)  ## Run the tests
	$(BIN)/python -m pytest -n auto --dist worksteal

soak: $(STAMP)  ## Run the slow tests, crash recordings in every way, many times (half an hour)
	$(BIN)/python -m pytest -m soak
	$(BIN)/python -m benchmarks.soak

lint: $(STAMP)  ## Check format, style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(STAMP)  ## Measure a real run, plant faults in two, measure other tools (two hours)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[bench]"
	$(BIN)/python -m benchmarks
	$(BIN)/python -m benchmarks.faults
	$(BIN)/python -m benchmarks.peers

clean:  ## Remove the environment and recorded runs
	rm -rf $(VENV) runs
