# Two commands are all a newcomer needs: `make quickstart` and `make test`. Both set everything up by themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# -qq: pip's warnings (a link that is not there, running as root, a newer pip) are left out; its errors are printed.
PIP := -m pip install -qq --disable-pip-version-check --root-user-action ignore

MINIMUM := .venv-minimum

.PHONY: setup quickstart test test-minimum gpu-check lint docs clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP) --constraint constraints.txt --editable '.[test]'
	touch $@

quickstart: setup
	$(BIN)/laserrec quickstart

test: setup
	$(BIN)/python -m pytest

# A core part of the tests with the oldest version of each dependency that pyproject.toml allows.
test-minimum:
	test -x $(MINIMUM)/bin/python || $(PYTHON) -m venv $(MINIMUM)
	$(MINIMUM)/bin/python $(PIP) uv
	$(MINIMUM)/bin/uv pip compile --quiet --resolution lowest-direct --extra test --python $(MINIMUM)/bin/python \
		--output-file $(MINIMUM)/constraints.txt pyproject.toml
	$(MINIMUM)/bin/python $(PIP) --constraint $(MINIMUM)/constraints.txt --editable '.[test]'
	$(MINIMUM)/bin/python -m pytest tests/test_config.py tests/util tests/data tests/llm tests/evaluation tests/methods \
		tests/retrieval tests/recommender tests/server tests/cli

# Results, speed and memory on this machine's GPU; without one, the tests on a pretended device.
gpu-check: setup
	$(BIN)/python benchmarks/gpu_check.py

lint: setup
	$(BIN)/ruff check laserrec tests benchmarks examples docs
	$(BIN)/ty check --python $(BIN)/python

docs: setup
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo 'docs/_build/html/index.html'

clean:
	rm -rf $(VENV) $(MINIMUM) runs docs/_build
