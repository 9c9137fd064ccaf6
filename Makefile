# Every target sets itself up in .venv when needed.
PYTHON ?= python3.11
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

TABLES := table1 table2 table3 table4 table5 table6 table7 table8 table9 table10 table11 protocol_audit
FIGURES := figure1 figure4 figure5 figure6 figure7 figure8 figure9 figure10 figure11
JOBS ?= 1
GRID = $(if $(SUITE),suite=$(SUITE)) $(if $(MODELS),model=$(MODELS)) $(ARGS) --jobs $(JOBS)

.PHONY: help setup run test check stress faults paper $(TABLES) figures $(FIGURES) report gpu architectures format tiny clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

help:  ## this list
	@sed -n 's/^\([a-z$$][^:]*\):.*##/\1:/p' $(MAKEFILE_LIST) | sed 's/$$(TABLES)/table1 ... table11, protocol_audit/; s/$$(FIGURES)/figure1 figure4 ... figure11/'

run: setup  ## the main job: HoReN edits the embedded model; ARGS="n=200" changes it
	$(BIN)/python -m horen_bench $(ARGS)

test: setup  ## the tests, warnings as errors
	$(BIN)/python -m pytest

check: setup  ## what CI runs: lint, format, types, tests
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m pytest

stress: setup  ## 50,000 edits into the embedded model, evaluated every 5,000 on a sample of 2,000 cases; draws the curves
	$(BIN)/python -m horen_bench n=50000 eval_cases=2000 results_dir=results/stress \
		checkpoints=[5000,10000,15000,20000,25000,30000,35000,40000,45000]
	$(BIN)/python -m horen_bench.results.plots results/stress/runs/* --out results/figures/stress

faults: setup  ## every write, fsync, rename, read and allocation of small runs fails once, and 200 runs are killed
	PYTHONPATH=benchmarks OMP_NUM_THREADS=1 $(BIN)/python -m faults $(ARGS)

# SUITE=tiny (embedded; the default without weights) or paper; MODELS=qwen25_7b fetches and runs that backbone alone;
# JOBS=2 does two runs side by side. What is stored is not run again.
$(TABLES): setup  ## a table of the paper: runs what is missing, prints it, writes it to results/tables
	$(BIN)/python -m horen_bench.paper $@ $(GRID)

figures $(FIGURES): setup  ## a figure of the paper, or all: runs what is missing, draws it into results/figures
	$(BIN)/python -m horen_bench.paper $@ $(GRID)

paper: setup  ## every table and figure
	$(BIN)/python -m horen_bench.paper paper,figures $(GRID)

report: setup  ## one page about all stored runs, results/report.html; ARGS="results results/stress" takes several folders
	$(BIN)/python -m horen_bench.report $(ARGS)

# WITH=python3 takes an interpreter that has the dependencies already, and no .venv is made.
gpu: $(if $(WITH),,setup)  ## measure all that needs a GPU, in under nine minutes, into results/gpu; ARGS=--dry tries it on the CPU
	$(if $(WITH),PYTHONPATH="$(CURDIR)/src" $(WITH),$(BIN)/python) benchmarks/gpu_suite.py $(ARGS)

architectures: setup  ## what each method does on each architecture of transformers, into docs/models.md (a minute)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/architectures.py --write

format: setup  ## put the code into the form that check wants
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

tiny: setup  ## train the embedded model again, into results/tiny (about 18 minutes)
	$(BIN)/python -m horen_bench.world.training --seed 0 --out results/tiny

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
