# Everything runs in .venv, which is made on first use. Needs make and Python 3.11 or newer, nothing else;
# another interpreter is chosen with `make PYTHON=/path/to/python ...`.
.POSIX:

PYTHON = $$(command -v python3.11 || command -v python3)
BIN = .venv/bin
READY = .venv/.ready

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-12s %s\n", $$1, $$2 }' Makefile

venv: $(READY) ## make .venv with the package (editable) and the tools, at the versions of constraints.txt

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt torch
	$(BIN)/pip install -c constraints.txt -e '.[dev]'
	touch $(READY)

demo: $(READY) ## register the embedded phantom pair; pictures and figures go to demo-output/
	$(BIN)/crossmorph demo --output demo-output

test: $(READY) ## the quick tests
	$(BIN)/pytest -n 2 -m 'not slow and not gpu'

test-slow: $(READY) ## the tests that take more than a few seconds
	$(BIN)/pytest -m 'slow and not gpu'

fuzz: $(READY) ## damaged files for every reader, 1000 each
	$(BIN)/python fuzz/run.py

installs: $(READY) ## build wheel and sdist; core alone and every extra alone, installed, imported, run
	$(BIN)/python tests/installs.py

lint: $(READY) ## ruff, formatting and mypy, changing nothing
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(READY) ## let ruff format the code and mend what it can
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

bench-setup: ## make benchmarks/.venv-peers with the programs that benchmarks/peers.py compares with
	$(PYTHON) -m venv benchmarks/.venv-peers
	benchmarks/.venv-peers/bin/pip install -r benchmarks/requirements-peers.txt

docs: $(READY) ## run the tutorials and make the site: build/docs/index.html
	$(BIN)/sphinx-build -W --keep-going -q -c docs . build/docs

drawings: $(READY) ## draw the pictures of docs/ anew
	$(BIN)/python docs/drawings/make.py
	$(BIN)/python docs/drawings/systems.py

clean: ## remove .venv, caches and demo-output
	rm -rf .venv benchmarks/.venv-peers demo-output dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage
	find src tests benchmarks docs -name __pycache__ -type d -exec rm -rf {} +

.PHONY: help venv demo test test-slow fuzz installs lint format bench-setup docs drawings clean
