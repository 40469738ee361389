# Everything works on a fresh machine with Python 3.11 or newer, git and make.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
CUDA ?= cuda13
BIN := .venv/bin
READY := .venv/.ready-$(CUDA)

.PHONY: demo test check format docs clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[$(CUDA),dev]'
	touch $@

demo: $(READY)
	$(BIN)/fkdpipe demo --out demo

test: $(READY)
	$(BIN)/python -m pytest

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -m "not slow"

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY)
	$(BIN)/python docs/make_cli.py
	$(BIN)/python docs/make_bytes.py

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
