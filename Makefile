# make demo: install, train the embedded example without a defense, attack it, report.   make test: install, run the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LAUNCH := $(BIN)/accelerate launch --config_file launch/accelerate/cpu.yaml
TEST_PROCESSES ?= $(shell getconf _NPROCESSORS_ONLN)

.PHONY: demo compare test test-fast lint format smoke bench audit mutants clean

demo: $(VENV)/.installed
	$(LAUNCH) train/run.py $(ARGS)
	@echo "open runs/quickstart/report.html; then compare: make demo ARGS='defenses.dedup={} run.name=quickstart-dedup'"

# What each defense buys and what it costs: six arms, two seeds, one report. The same command resumes.
compare: $(VENV)/.installed
	$(BIN)/python launch/compare.py --config configs/compare/phantom.yaml $(ARGS)

# One test process per core, with one thread each: small tensors do not fill several cores. Files in the order of their names: by
# default those with few tests come last, and the longest test would run alone at the end.
test: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

test-fast: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile -m "not slow and not multi"

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The whole job on tiny pictures in half a minute: does it still run from end to end?
smoke: $(VENV)/.installed
	rm -rf runs/smoke
	$(LAUNCH) train/run.py --config configs/smoke.yaml

bench: $(VENV)/.installed-test
	$(BIN)/python bench/train_throughput.py
	$(BIN)/python bench/dp_step.py
	$(BIN)/python bench/search.py
	$(BIN)/python bench/cliques.py

# Does one private step give away more than its noise allows? On a tiny network, 1,000 trials with and without a record.
audit: $(VENV)/.installed
	$(BIN)/python -m eval.audit_mechanism

# Every known way to break DP-SGD without an error message, planted in a copy: each must be caught by its test.
mutants: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutants.py $(ARGS)

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed (make PYTHON=python3.12 ...)")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
