# make demo: everything from nothing to a table of speeds.  make test: the whole test suite.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NATIVE := $(wildcard csrc/*.h csrc/*.def csrc/ref/* csrc/codecs/* csrc/cpu/* csrc/ffi/*)

.PHONY: help venv ext demo test lint format clean

help:
	@echo "make demo    build stock and patched llama.cpp, fetch a small model, generate, print a table"
	@echo "make test    set up, check the style, run every test"
	@echo "make lint    the style checks alone;  make format  repairs what can be repaired"
	@echo "make clean   removes the virtual environment and build/ (llama.cpp builds stay in PYTQ_HOME)"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: Python 3.10 or newer is needed: make PYTHON=python3.11" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

# The extension is compiled by the install, so the stamp depends on its sources too.
$(VENV)/.installed: $(BIN)/python pyproject.toml setup.py CMakeLists.txt pytq/ffi_build.py $(NATIVE)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --upgrade "pip>=24"
	@echo "installing pytq and what it needs into $(VENV) (a minute or two) ..." >&2
	$(BIN)/python -m pip install --disable-pip-version-check -qq -e ".[dev]"
	$(BIN)/python -m pytq.fetch binding
	@touch $@

venv: $(VENV)/.installed

# The extension alone, into the tree, for whatever Python is active.
ext:
	$(PYTHON) setup.py --quiet build_ext --inplace

demo: venv
	$(BIN)/pytq demo

test: venv lint
	$(BIN)/pytq build
	$(BIN)/pytq model default
	$(BIN)/python -m pytest -n 2 -m "not slow and not serial" tests
	$(BIN)/python -m pytest -m "slow or serial" --ignore tests/test_llama.py tests
	$(BIN)/python -m pytest tests/test_llama.py  # alone: a process can load one llama.cpp library, and calibration loads stock

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@files=$$(git ls-files 'csrc/*.c' 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh'); \
	  test -z "$$files" || $(BIN)/clang-format --dry-run --Werror $$files
	$(BIN)/python tools/patches.py check
	$(BIN)/python tools/gen_help.py --check
	$(BIN)/python tools/gen_backends.py --check
	$(BIN)/python tools/gen_golden.py --check

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	@files=$$(git ls-files 'csrc/*.c' 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh'); \
	  test -z "$$files" || $(BIN)/clang-format -i $$files

clean:
	rm -rf $(VENV) build pytq.egg-info pytq/_pytq*.so pytq/_pytq.c
