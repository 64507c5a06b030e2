# Each target sets up .venv first, from the pinned requirements.txt; nothing else needs to be installed by hand.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: train test test-all lint faults bench cuda gpu
train: .venv/run.stamp
	$(BIN)/python train.py config/small.py resume=auto

test: .venv/dev.stamp lint
	$(BIN)/python -m pytest -n auto --maxprocesses=8 --dist worksteal

test-all: .venv/dev.stamp lint
	$(BIN)/python -m pytest -m '' -n auto --maxprocesses=8 --dist worksteal --ignore=tests/test_fake_cuda.py

cuda: .venv/dev.stamp
	$(BIN)/python -m pip install -e '.[cubin]'
	$(BIN)/python -m pytest tests/test_fake_cuda.py -m '' -n 2

faults: .venv/dev.stamp
	PYTHONPATH=.:tests $(BIN)/python -m faults

lint: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: .venv/run.stamp
	$(BIN)/python -m lab.bench train config/small.py

gpu: .venv/run.stamp
	$(BIN)/python -m lab.bench gpu

.venv/run.stamp: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -r requirements.txt
	touch $@

.venv/dev.stamp: .venv/run.stamp pyproject.toml
	$(BIN)/python -m pip install -r requirements.txt -e '.[dev]'
	touch $@
