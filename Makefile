# Everything is made inside the checkout: .uv (the installer), .venv (the server and its tools), state (runs).
# Needs python3 >= 3.11 with venv, git and make; the system's Python is only ever read.

PYTHON ?= /usr/bin/env python3
UV_VERSION := 0.13.8

BIN := .venv/bin
UV := .uv/bin/uv
export UV_PYTHON_DOWNLOADS := never
# A venv that happens to be active is not ours to write to.
unexport VIRTUAL_ENV UV_PROJECT_ENVIRONMENT PYTHONHOME PYTHONPATH

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo serve test check format docs bench lock clean

help: ## this list
	@grep -E '^[a-z]+:.*##' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z]+):[^#]*## /\1\t/' \
	  | while IFS="$$(printf '\t')" read -r name what; do printf '  make %-8s %s\n' "$$name" "$$what"; done

install: .venv/.installed ## make .venv with the command ai-agent-server in it

demo: install ## solve a real task on the embedded model and show how
	@$(BIN)/ai-agent-server demo

serve: install ## run the server on http://127.0.0.1:3160 until Ctrl-C
	@$(BIN)/ai-agent-server serve

test: install ## run every test
	@$(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

check: install ## formatting, lint, types, import contracts, generated documents
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/python -m ai_agent_server.docs --check

format: install ## format the code and mend what the linter can
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

docs: install ## write the generated documents again
	@$(BIN)/python -m ai_agent_server.docs

bench: install ## measure, print and keep the figures
	@$(BIN)/python -m bench.run

lock: $(UV) ## choose the newest versions that pyproject.toml allows and lock them
	@$(UV) pip compile pyproject.toml --extra embedded --extra gpu --extra otlp --group dev --python-version 3.11 --universal \
	  --generate-hashes --no-annotate --no-header --upgrade --quiet -o requirements.lock

clean: ## remove what was made: .venv, .uv and the caches; state stays
	@rm -rf .venv .uv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis

# The stamp is the last thing written, so an install that was cut short is taken up again.
.venv/.installed: requirements.lock pyproject.toml $(UV)
	@test -x $(BIN)/python || $(PYTHON) -m venv --without-pip .venv
	@echo "Installing into .venv ..."
	@$(UV) pip sync --quiet --python $(BIN)/python --require-hashes --compile-bytecode requirements.lock
	@$(UV) pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

$(UV):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "python3 must be 3.11 or newer (make PYTHON=python3.12 names another)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "python3 has no venv module; on Debian: apt-get install python3-venv" >&2; exit 1; }
	@echo "Fetching the installer, uv $(UV_VERSION), into .uv ..."
	@$(PYTHON) -m venv --clear .uv
	@.uv/bin/python -m pip install --quiet --disable-pip-version-check --only-binary :all: uv==$(UV_VERSION)
