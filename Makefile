# make demo: the main job on the embedded model, report in report.json
# make test: the tests
# Both make .venv first, and again when pyproject.toml or constraints.txt change.

PYTHON = python3
PIP = .venv/bin/python -m pip --disable-pip-version-check

# Spinning OpenMP threads make CPU runs vary 10 to 35 times.
OMP_WAIT_POLICY = passive
export OMP_WAIT_POLICY

.PHONY: demo test lint

demo: .venv/.installed
	.venv/bin/python -m pytest compositions -k "memit and awq" --lmcompose-json=report.json

test: .venv/.installed
	.venv/bin/python -m pytest tests -m "not slow"

lint: .venv/.installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

# torch first and alone: what follows then takes it as it is.
.venv/.installed: pyproject.toml constraints.txt
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	$(PIP) install -q -c constraints.txt torch
	$(PIP) install -q -c constraints.txt -e ".[dev]"
	touch .venv/.installed
