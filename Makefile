# `make train` meta-trains the quickstart and compares it with tuned AdamW, `make test` runs all tests.
PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: train pretrain test test-all chaos lint format clean

train: .venv/.installed
	@$(BIN)/lopt-train quickstart

# make pretrain NAME=l2o-lasso: the weights of checkpoints/l2o-lasso from nothing, into runs/l2o_lasso/artifact.
pretrain: .venv/.installed
	@test -n "$(NAME)" || { echo "valid: make pretrain NAME=$$(ls checkpoints | grep -v README | paste -sd'|')"; exit 2; }
	@$(BIN)/lopt-train $(NAME)

test: lint
	@mkdir -p runs/tests
	@$(BIN)/python -m pytest -n 2 --junitxml=runs/tests/junit.xml
	@$(BIN)/python -m tests.closing

test-all: lint
	@mkdir -p runs/tests
	@$(BIN)/python -m pytest -n 2 --slow --junitxml=runs/tests/junit.xml

chaos: .venv/.installed
	@$(BIN)/python -m tests.chaos

lint: .venv/.installed
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet . || { echo "not formatted: run make format"; exit 1; }
	@$(BIN)/pyrefly check --summary=none 2>/dev/null || $(BIN)/pyrefly check

format: .venv/.installed
	@$(BIN)/ruff check --fix --quiet .
	@$(BIN)/ruff format --quiet .

# constraints.txt holds the versions that were tested; a user's own `pip install` is free of it.
.venv/.installed: pyproject.toml constraints.txt
	@echo "installing into .venv (about two minutes the first time)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -qq --constraint constraints.txt --editable '.[all,dev]'
	@touch $@

clean:
	rm -rf .venv dist build .cache
