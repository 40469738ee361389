# Everything works on a fresh machine with Python 3.11 or newer, git and make.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
CUDA ?= cuda13
BIN := .venv/bin
READY := .venv/.ready-$(CUDA)

.PHONY: demo test check lint format docs matrix wheel clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[$(CUDA),dev]'
	touch $@

demo: $(READY)
	$(BIN)/fkdpipe demo --out demo

# Everything that CI checks.
test: lint
	$(BIN)/python -m pytest

check: lint
	$(BIN)/python -m pytest -m "not slow"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY)
	$(BIN)/python docs/make_cli.py
	$(BIN)/python docs/make_bytes.py

# The supported Pythons and the lowest declared dependencies; its table goes into CONTRIBUTING.md.
matrix:
	.ci/matrix

# dist/fkdpipe-*.whl, which holds the committed files of fkdpipe/ and nothing else.
wheel: $(READY)
	rm -rf build dist
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	mkdir -p build && git ls-files fkdpipe | LC_ALL=C sort > build/expected
	$(BIN)/python -m zipfile --list dist/*.whl | awk 'NR > 1 && !/\.dist-info\// {print $$1}' \
		| LC_ALL=C sort | diff build/expected -

clean:
	rm -rf .venv .matrix build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
