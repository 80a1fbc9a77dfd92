# `make demo` and `make test` need Python 3.11 or newer, and nothing else: each makes what it needs in .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := demo
TORCH_INDEX := https://download.pytorch.org/whl/cpu

.PHONY: demo test test-fast bench lint clean

demo: $(VENV)/.compile,eval
	$(BIN)/smc build --gpu cpu --checkpoint examples/pocket --shape 512x384 --out exported/bundles/demo
	mkdir -p $(DEMO)
	$(BIN)/smc match examples/graf1.png examples/graf3.png --bundle exported/bundles/demo \
		--homography examples/H1to3p.xml --out $(DEMO)/matches.npz --viz $(DEMO)/matches.png

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n auto --dist loadgroup

# Without the tests that build the 2.75 GB model.
test-fast: $(VENV)/.dev
	$(BIN)/python -m pytest -n auto --dist loadgroup -m "not large"

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/fastnn.py

# mypy reads an installed copy: it cannot follow setup.py's mapping of the folders.
lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build
	$(BIN)/pip install --quiet --no-deps --target build/typed .
	MYPYPATH=build/typed $(BIN)/mypy -p smc

clean:
	rm -rf $(VENV) $(DEMO) exported/bundles build *.egg-info

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch from its own index, if that can be reached: its build for CPUs is a tenth of the one on PyPI, and asks for no Triton of its own.
$(VENV)/.torch: $(VENV)/bin/python constraints.txt
	$(BIN)/pip install --quiet --retries 0 --extra-index-url $(TORCH_INDEX) -c constraints.txt torch
	touch $@

$(VENV)/.%: $(VENV)/.torch pyproject.toml setup.py
	$(BIN)/pip install --quiet -c constraints.txt -e '.[$*]'
	touch $@
