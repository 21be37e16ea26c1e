# `make demo` teaches a small model five tasks, `make test` runs the whole suite, `make docs` builds the pages in site/.
# Each sets up .venv first. `make floor` runs the suite in .venv-floor, with the lowest versions of transformers and
# peft that are allowed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# two processes of one thread each: most tests are too small for a second thread to help; files begin in their order, or
# the longest test, alone in its file, would begin last
PYTEST := -m pytest -n 2 --dist loadfile --no-loadscope-reorder
export TOKENIZERS_PARALLELISM = false

.PHONY: demo test docs floor lint install clean

install: $(STAMP)

# sets up the virtual environment that the target's stamp lies in, with the constraints that it depends on
define environment
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --upgrade pip
	$(@D)/bin/python -m pip install --quiet --constraint $(lastword $^) torch
	$(@D)/bin/python -m pip install --quiet --constraint $(lastword $^) --editable '.[dev]'
	touch $@
endef

$(STAMP): pyproject.toml constraints.txt
	$(environment)

.venv-floor/.installed: pyproject.toml constraints-floor.txt
	$(environment)

demo: install
	$(BIN)/folklora learn --demo --out runs/demo --overwrite

test: install
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST)

floor: .venv-floor/.installed
	OMP_NUM_THREADS=1 .venv-floor/bin/python $(PYTEST)

docs: install
	$(BIN)/mkdocs build --strict

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) .venv-floor runs build dist site
