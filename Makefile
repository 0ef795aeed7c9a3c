# make train   create .venv, install, pretrain the default model (ARGS="model=phd_swa" overrides)
# make test    create .venv, install, lint, type check, test
# make soak-data CASES=500 SEED=0   random corpora, kills and changes of ranks: the same rows always
# make soak-faults KILLS=20 SIGNALS=50 SEED=0   killed ranks and machines: the same run always
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
TESTS ?=
CASES ?= 500
KILLS ?= 20
SIGNALS ?= 50
SEED ?= 0

.PHONY: train test check soak-data soak-faults install clean

train: $(VENV)/.installed
	$(BIN)/python train/main.py $(ARGS)

# Two test processes of one thread each: more would wait for each other on two cores. A file is one's
# own: its tests look at runs that they share.
test: check
	OMP_NUM_THREADS=1 PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(TESTS)

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A failing case is named after its seed: test_...[17] is CASES=1 SEED=17.
soak-data: $(VENV)/.installed
	OMP_NUM_THREADS=1 CASES=$(CASES) SEED=$(SEED) $(BIN)/python -m pytest -q -n 2 tests/data/test_soak.py

soak-faults: $(VENV)/.installed
	KILLS=$(KILLS) SIGNALS=$(SIGNALS) SEED=$(SEED) $(BIN)/python -m pytest -q -s tests/train/distributed/test_soak.py

install: $(VENV)/.installed

# Made again whenever what it is made from has changed.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,hf]"
	touch $@

clean:
	rm -rf $(VENV) runs bench
