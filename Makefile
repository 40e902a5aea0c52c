# Every target makes its own .venv; nothing is needed beforehand but Python (3.10 or later), pip and make.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: help venv data browser demo test test-all pythons floors check licences wheel frozen docs bench bench-quick notebooks reproduce clean

help: ## Show the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

venv: $(INSTALLED) ## Make or update .venv

data: $(INSTALLED) ## Fetch the model and the text that demo and tests use (cached outside the tree)
	$(BIN)/python scripts/data.py

browser: ## Install Debian's chromium, in which tests look at reports, and the shells that they type in, if apt can
	@missing=""; for one in chromium zsh fish; do command -v $$one >/dev/null || missing="$$missing $$one"; done; \
	if [ -z "$$missing" ]; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get -qq update && apt-get -qq install -y --no-install-recommends $$missing >/dev/null; \
	else echo "missing:$$missing; tests that need them will be skipped, and fail where CI is set"; fi

demo: data ## Tickets of SmolLM2-135M, then early birds of two vision networks beside their controls
	$(BIN)/lottery-tickets demo --output tickets
	$(BIN)/lottery-tickets early-bird lenet-300-100 --data mnist -s 0.5 -s 0.8 --lr 0.1 --epochs 15 \
		--controls --plot --output tickets/lenet
	$(BIN)/lottery-tickets early-bird batchnorm-cnn --data mnist -s 0.5 -s 0.8 --lr 0.05 --epochs 15 \
		--controls --control-epochs 10 --plot --output tickets/cnn

test: data browser ## Tests and documents' examples on two cores, about 7 minutes
	$(BIN)/pytest --numprocesses 2 --dist loadfile --cov --cov-report=term

test-all: data browser ## Slow proofs too, then other Pythons and the lowest versions
	$(BIN)/pytest -m ''
	$(BIN)/nox

pythons: data browser ## The wheel and the core of the suite on every Python that is to be had
	$(BIN)/nox --session pythons

floors: data browser ## The core of the suite on the lowest versions that pyproject.toml allows
	$(BIN)/nox --session floors

check: $(INSTALLED) ## Format, lint, types, import directions, docstrings, documents
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest --quiet src
	$(BIN)/mkdocs build --strict --quiet

licences: $(INSTALLED) ## Licences of everything that an installation brings
	$(BIN)/python scripts/licences.py

wheel: $(INSTALLED) ## The wheel and the source distribution, in dist/
	$(BIN)/python -m build

frozen: $(INSTALLED) ## Write down anew what the command line promises, after a change that is meant
	$(BIN)/python scripts/frozen.py

docs: $(INSTALLED) ## Serve the documents on localhost
	$(BIN)/mkdocs serve

bench: data ## Run the benchmarks; results go to benchmarks/results/ and docs/measurements.md
	$(BIN)/python benchmarks/import_time.py
	$(BIN)/python benchmarks/selection.py
	$(BIN)/python benchmarks/evaluation.py
	$(BIN)/python benchmarks/scoring.py
	$(BIN)/python benchmarks/criteria.py
	$(BIN)/python benchmarks/restoring.py
	$(BIN)/python benchmarks/early_bird_optimizers.py
	$(BIN)/python benchmarks/early_bird_memory.py
	$(BIN)/python benchmarks/early_bird_check.py
	$(BIN)/python benchmarks/rank_correlation.py
	$(BIN)/python benchmarks/imp.py
	$(BIN)/python benchmarks/structured.py
	$(BIN)/python benchmarks/deployment.py
	$(BIN)/python benchmarks/early_bird_channels.py
	$(BIN)/python benchmarks/memory_plan.py
	$(BIN)/python benchmarks/batch_sizes.py
	$(BIN)/python benchmarks/streaming.py
	$(BIN)/python benchmarks/distributed.py
	$(BIN)/python benchmarks/quality_from_disk.py
	$(BIN)/python benchmarks/tables.py

bench-quick: data ## Every benchmark in its quick form, into one file and docs/measurements-quick.md
	$(BIN)/python benchmarks/run_all.py
	$(BIN)/python benchmarks/tables.py

notebooks: data ## Run the notebooks and keep what they show: some minutes
	$(BIN)/python scripts/notebooks.py

reproduce: $(INSTALLED) ## The lottery ticket papers, again: an hour or more; go on with it by calling it again
	$(BIN)/python benchmarks/reproduce.py --jobs 2
	$(BIN)/python benchmarks/figures.py
	$(BIN)/python benchmarks/tables.py

clean: ## Remove everything the targets made in the tree
	rm -rf .venv .nox site dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage tickets reproduce
