# make demo      the whole pipeline on this machine's CPU, then the chat page (PORT=8000; SERVE=0 stops at the report)
# make test      style, types and all tests          make test-fast   the same without cluster, browser and slow tests
# make install   .venv with everything for development; the others do it when pyproject.toml has changed

PYTHON ?= $(firstword $(shell command -v python3.11 python3.12 python3))
PORT   ?= 8000
SERVE  ?= 1
BIN    := .venv/bin
PIP    := $(BIN)/python -m pip install --disable-pip-version-check --quiet --no-compile

# Ray starts dozens of processes; without bytecode each compiles torch and Ray anew, which takes 9 seconds of a core.
unexport PYTHONDONTWRITEBYTECODE
WARM   := $(BIN)/python -c "import ray.train.torch, ray.data, ray.serve, torch, fastapi, matplotlib.figure, pandas"
BUILD  := $(BIN)/python -m kernels.cpu_build

.DEFAULT_GOAL := help
.PHONY: help install demo test test-fast lint clean

help:
	@sed -n '/^$$/q; s/^# //p' Makefile

$(BIN)/python:
	$(PYTHON) -m venv .venv

# Two stamps: the demo does not wait for the tools of development.
.venv/installed: pyproject.toml | $(BIN)/python
	@echo "installing nanochat_ray and its dependencies into .venv (a few minutes the first time)"
	$(PIP) --editable .
	@$(WARM)
	@$(BUILD)
	@touch $@

.venv/installed-dev: pyproject.toml | $(BIN)/python
	@echo "installing nanochat_ray, its dependencies and the tools of development into .venv"
	$(PIP) --editable '.[dev]'
	@$(WARM)
	@$(BUILD)
	@touch .venv/installed $@

install: .venv/installed-dev

demo: .venv/installed
	$(BIN)/python -m jobs.speedrun --preset tiny --port $(PORT) $(if $(filter 0,$(SERVE)),,--serve)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

QUICK := not ray and not browser and not slow

test: test-fast
	$(BIN)/python -m pytest -m "not ($(QUICK))"

test-fast: lint
	$(BIN)/python -m pytest --numprocesses 2 -m "$(QUICK)"

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis nanochat_ray.egg-info build dist
	find nanochat_ray jobs kernels tests -name __pycache__ -type d -prune -exec rm -rf {} +
