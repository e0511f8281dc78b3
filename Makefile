# `make demo` and `make test` set up everything they need in .venv, once.
#
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu   PyTorch's CPU build
#   make test PYTHON=/path/to/python3.12                         a certain interpreter

TORCH_INDEX ?=
PYTHON ?=
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# mkdocs-material announces the end of mkdocs 1 on every build.
export NO_MKDOCS_2_WARNING = 1

.PHONY: help setup demo test test-all lint docs clean distclean
.DELETE_ON_ERROR:

help:
	@echo "make demo      distil a teacher of handwritten digits to one step -> demo/"
	@echo "make test      the tests, those of the documentation included"
	@echo "make test-all  the slow tests as well"
	@echo "make lint      style, types and the direction of imports"
	@echo "make docs      the documentation -> site/"
	@echo "make clean     remove what was made; make distclean: .venv too"

setup: $(READY)

demo: $(READY)
	$(BIN)/python examples/digits.py --out demo

# One thread a worker: workers that share cores slow each other down.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

test-all: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m ""

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/basedpyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

docs: $(READY)
	$(BIN)/mkdocs build --strict

clean:
	rm -rf demo site dist build htmlcov .coverage .coverage.* .hypothesis \
	  .pytest_cache .ruff_cache .import_linter_cache
	find dmdkit examples tests docs conftest.py -name __pycache__ -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)

# The line to type when Python (or, for the version in $$found, its venv) is missing.
define MISSING
if command -v apt-get >/dev/null; then \
  version=$$(for v in $${found:-3.13 3.12 3.11}; do \
    apt-cache show python$$v 2>/dev/null | grep -q . && echo $$v && break; done); \
  echo "  sudo apt-get install -y python$${version:-3} python$${version:-3}-venv"; \
elif command -v dnf >/dev/null; then echo "  sudo dnf install -y python3.12"; \
elif command -v brew >/dev/null; then echo "  brew install python@3.12"; \
else echo "  make $(MAKECMDGOALS) PYTHON=/path/to/python3.12"; fi
endef

$(READY): pyproject.toml
	@set -e; \
	if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	  found=; \
	  for python in $(or $(PYTHON),python3.13 python3.12 python3.11 python3 python); do \
	    if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; \
	    then found=$$python; break; fi; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo "No Python 3.11 or newer was found. Type this, then run make again:" >&2; \
	    ( $(MISSING) ) >&2; exit 1; \
	  fi; \
	  if ! $$found -c 'import venv, ensurepip' 2>/dev/null; then \
	    echo "$$found has no venv module. Type this, then run make again:" >&2; \
	    found=$$($$found -c 'import sys; print("%d.%d" % sys.version_info[:2])'); \
	    ( $(MISSING) ) >&2; exit 1; \
	  fi; \
	  rm -rf $(VENV); $$found -m venv $(VENV); \
	fi
	@echo "Setting up $(VENV): PyTorch and others, some minutes ..."
ifneq ($(TORCH_INDEX),)
	$(BIN)/python -m pip install --quiet --index-url $(TORCH_INDEX) torch torchvision
endif
	$(BIN)/python -m pip install --quiet --editable ".[test,docs]"
	@touch $@
