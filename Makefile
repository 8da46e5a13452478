.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
OLDEST := .venv-oldest
DEEPSPEED := .venv-deepspeed
WHEEL := .venv-wheel
BIN := $(VENV)/bin
# A file's tests stay together, as they share what was trained for them.
PARALLEL := -n 2 --dist loadscope

.PHONY: help demo docs package test test-slow test-oldest test-deepspeed check clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/demo ## Distil a small ViT on handwritten digits and print what it gained (some minutes)
	$(BIN)/python examples/quickstart.py

docs: $(VENV)/ready ## Build the documentation, as out/docs/index.html; a warning is an error
	$(BIN)/sphinx-build -W -n -q -d out/doctrees docs out/docs

package: $(VENV)/ready ## Build the wheel and the source archive in dist/, check them, and try the wheel in an empty environment
	rm -rf dist $(WHEEL)
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	$(PYTHON) -m venv $(WHEEL)
	$(WHEEL)/bin/pip install -q -c constraints.txt dist/*.whl
	cd $(WHEEL) && bin/pip check && bin/python -m hf_rrd env

test: $(VENV)/ready ## Run the fast tests
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow"

test-slow: $(VENV)/ready ## Run the others: kills, command lines, compilation, benchmarks
	$(BIN)/python -m pytest $(PARALLEL) -m slow

test-oldest: $(OLDEST)/ready ## Run the tests with transformers 5.0, in an environment of its own
	$(OLDEST)/bin/python -m pytest $(PARALLEL)

test-deepspeed: $(DEEPSPEED)/ready ## Run the tests of DeepSpeed and of quantised teachers, in an environment of its own
	$(DEEPSPEED)/bin/python -m pytest tests/training/test_distributed_deepspeed.py tests/models/test_teacher_placement.py

check: $(VENV)/ready ## Lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean: ## Remove environments, caches and outputs
	rm -rf $(VENV) $(OLDEST) $(DEEPSPEED) $(WHEEL) dist out .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch first and alone: its pinned build satisfies all that the others ask of it.
$(VENV)/demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[demo]'
	@touch $@

$(VENV)/ready: $(VENV)/demo
	$(BIN)/pip install -q -c constraints.txt -e '.[dev,docs,onnx]'
	@touch $@

$(OLDEST)/ready: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install -q -c constraints-oldest.txt torch
	$(OLDEST)/bin/pip install -q -c constraints-oldest.txt -e '.[dev]'
	@touch $@

# Without its compiled parts, which need a GPU.
$(DEEPSPEED)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DEEPSPEED)
	$(DEEPSPEED)/bin/pip install -q -c constraints.txt torch
	$(DEEPSPEED)/bin/pip install -q -c constraints.txt -e '.[dev]' setuptools wheel ninja
	DS_BUILD_OPS=0 $(DEEPSPEED)/bin/pip install -q -c constraints.txt --no-build-isolation deepspeed bitsandbytes
	@touch $@
