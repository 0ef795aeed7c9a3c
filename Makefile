# make train   create .venv, install, pretrain the default model (ARGS="model=phd_swa" overrides)
# make test    create .venv, install, lint, type check, test
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
TESTS ?=

.PHONY: train test check install clean

train: $(VENV)/.installed
	$(BIN)/python train/main.py $(ARGS)

# Two test processes of one thread each: more would wait for each other on two cores.
test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(TESTS)

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(VENV)/.installed

# Made again whenever what it is made from has changed.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,hf]"
	touch $@

clean:
	rm -rf $(VENV) runs bench
