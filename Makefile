# Everything a contributor runs. Needs Python 3.11 to 3.14 with pip and venv, and make; works offline once .venv exists.
PYTHON ?=
WORKERS ?= 2
CODE := hra_export converters tests benchmarks examples
BIN := .venv/bin

.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory
.PHONY: help .venv test slow lint format demo bench wheel clean

help: ## list the targets
	@sed -n 's/^\([.a-z]*\):.*## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | awk -F '\t' '{ printf "make %-8s%s\n", $$1, $$2 }'

.venv: .venv/.installed ## install the tested set of packages and this checkout

# A stamp and not the folder itself: an installation that broke off must not pass for a whole one.
.venv/.installed: pyproject.toml constraints.txt
	@python=$$(PYTHON='$(PYTHON)' sh .ci/find-python) || exit 1; \
	echo "installing the tested set of packages into .venv with $$($$python --version): a few minutes the first time" >&2; \
	$$python -m venv .venv || { echo "error: $$python cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt setuptools
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	@touch $@

test: .venv/.installed ## run the tests, those on real models included (not the slow ones)
	@$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

slow: .venv/.installed ## run the tests that take minutes
	@$(BIN)/python -m pytest -m slow

lint: .venv/.installed ## check style, format and types
	@$(BIN)/ruff check $(CODE)
	@$(BIN)/ruff format --check $(CODE)
	@$(BIN)/mypy $(CODE)

format: .venv/.installed ## format the code, and fix what can be fixed without thought
	@$(BIN)/ruff check --fix-only --quiet $(CODE)
	@$(BIN)/ruff format $(CODE)

demo: .venv/.installed ## train, merge, export, convert and validate a real language model
	@$(BIN)/python examples/demo.py

# A benchmark that ends with 7 lacks its device, a GPU as a rule: the others go on.
bench: .venv/.installed ## run every benchmark; tables on stdout, figures in benchmarks/results
	@for file in $$(grep -l '__main__' benchmarks/*.py); do \
		$(BIN)/python -m benchmarks.$$(basename $$file .py) || [ $$? -eq 7 ] || exit 1; \
	done

wheel: .venv/.installed ## build the wheel into dist
	@$(BIN)/python -m build --wheel --no-isolation --outdir dist .

clean: ## remove what the other targets made
	@rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
	@find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +
