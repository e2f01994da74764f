# Two commands for a new user: `make demo` and `make test`. Both make .venv first, with plain pip.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lab lint types clean

demo: .venv/installed
	$(BIN)/smalti demo out=demo

test: .venv/installed-dev
	$(BIN)/python -m pytest
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -m interpreter tests/kernels

# Hosts and a SLURM cluster of their own on this machine: needs root, ip, sshd, pdsh, slurm-wlm and munge.
lab: .venv/installed-dev
	$(BIN)/python -m tests.lab.hosts
	$(BIN)/python -m tests.lab.slurm

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed-dev
	$(BIN)/mypy

.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("smalti needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable .
	@touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/pip install --quiet --editable ".[dev]"
	@touch $@

clean:
	rm -rf .venv demo
