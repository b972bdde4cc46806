# Every target creates .venv and installs into it only what it needs. Python 3.11 or newer must be
# there. Another interpreter (`make test PYTHON=python3.12`) has an environment of its own.

PYTHON ?= python3
unexport PYTHON  # the tests look at what `make` does without it
VERSION = $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
VENV := .venv$(if $(filter-out python3,$(PYTHON)),-$(or $(VERSION),$(error $(PYTHON) does not run)))
BIN := $(VENV)/bin
# One more than there are cores: tests that wait for servers and browsers leave them idle.
WORKERS = $(shell $(PYTHON) -c 'import os; print(1 + (os.cpu_count() or 1))')
FOR_DEMO := $(VENV)/installed-demo
FOR_TEST := $(VENV)/installed-test

# For Linux, PyPI has only torch with CUDA: several GB. PyTorch's own index has it for CPUs.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

# Modules are compiled when they are first imported: of all that is installed a fifth ever is, and to
# compile the rest takes a minute. Without compiled files every process would compile torch again.
unexport PYTHONDONTWRITEBYTECODE
PIP := $(BIN)/python -m pip install --no-compile

INSTALL_TORCH = @echo "Installing torch into $(VENV) ..."; \
	$(PIP) -qq --no-deps --retries 0 --timeout 10 --constraint constraints.txt torch --index-url $(TORCH_INDEX) >/dev/null 2>&1 || \
	echo "$(TORCH_INDEX) cannot be reached, or has no torch for this Python. PyPI's is taken, several GB on Linux."

# Quietly; if that fails, again with all that pip has to say.
INSTALL = @echo "Installing $(WHAT) into $(VENV) ..."; \
	$(PIP) -qq --constraint constraints.txt --editable $(PACKAGE) >/dev/null 2>&1 || \
	$(PIP) --constraint constraints.txt --editable $(PACKAGE)

.DEFAULT_GOAL := help
.PHONY: help demo install test quick soak lint bench picture clean

help:  ## Show what can be made
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

$(FOR_DEMO): WHAT = the rest of what the demo needs
$(FOR_DEMO): PACKAGE = .
$(FOR_DEMO): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info < (3, 11) and sys.exit("Python 3.11 or newer is needed, and $(PYTHON) is %d.%d: try PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL_TORCH)
	$(INSTALL)
	@touch $@

$(FOR_TEST): WHAT = what the tests need
$(FOR_TEST): PACKAGE = ".[test,lint]"
$(FOR_TEST): $(FOR_DEMO)
	$(INSTALL)
	@touch $@

demo: $(FOR_DEMO)  ## Train, record, check and draw a short run
	$(BIN)/thimble-zarr demo runs/demo.zarr --overwrite

install: $(FOR_TEST)  ## Install what demo and tests need, without running them

test: $(FOR_TEST)  ## Run the tests
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

quick: $(FOR_TEST)  ## Run the tests but for the slow ones
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not soak and not slow"

soak: $(FOR_TEST)  ## Run the slow tests, crash recordings in every way, many times (half an hour)
	EVERY_KIND=1 $(BIN)/python -m pytest -m soak
	$(BIN)/python -m benchmarks.soak

lint: $(FOR_TEST)  ## Check format, style, types and spelling
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/codespell

bench: WHAT = what the benchmarks need
bench: PACKAGE = ".[bench]"
bench: $(FOR_TEST)  ## Measure a real run, plant faults in two, measure other tools (two hours)
	$(INSTALL)
	$(BIN)/python -m benchmarks
	$(BIN)/python -m benchmarks.faults
	$(BIN)/python -m benchmarks.peers

picture: $(FOR_TEST)  ## Take the picture in the README, of a run of 1,000 steps, in a browser (ten minutes)
	$(BIN)/thimble-zarr train runs/picture.zarr --batch-size 16 --overwrite
	$(BIN)/thimble-zarr report runs/picture.zarr -o runs/picture.html
	$(BIN)/python -m benchmarks.picture runs/picture.html -o docs/report.png

clean:  ## Remove the environments and recorded runs
	rm -rf .venv .venv-* runs
