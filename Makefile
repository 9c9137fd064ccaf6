# Every target sets itself up in .venv when needed.
PYTHON ?= python3.11
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: setup run test check stress format tiny clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

run: setup  ## the main job: HoReN edits the embedded model; ARGS="n=200" changes it
	$(BIN)/python -m horen_bench $(ARGS)

test: setup  ## the tests, warnings as errors
	$(BIN)/python -m pytest

check: setup  ## what CI runs: lint, format, types, tests
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m pytest

stress: setup  ## 50,000 edits into the embedded model, questioned every 5,000 on a sample of 2,000 cases; draws the curves
	$(BIN)/python -m horen_bench n=50000 eval_cases=2000 results_dir=results/stress \
		checkpoints=[5000,10000,15000,20000,25000,30000,35000,40000,45000]
	$(BIN)/python -m horen_bench.figures results/stress/runs/* --out results/figures/stress

format: setup
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

tiny: setup  ## train the embedded model again (about 10 minutes)
	$(BIN)/python -m horen_bench.models.tiny --seed 0 --out data/tiny

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
