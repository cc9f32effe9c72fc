# Every target does its own set-up: a virtual environment in .venv, filled once for each set of dependencies.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help demo serve train test test-browser compose-test scaling-out-test kubernetes-check screenshots check format clean

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | sort

$(VENV)/.%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	touch $@

demo: $(VENV)/.demo  ## Start everything, draw eight label lists, print the verdicts, write grid.png
	$(BIN)/python -m service.local.demo

serve: $(VENV)/.worker  ## Redis, a worker and the API on http://127.0.0.1:8000
	$(BIN)/python -m service

train: $(VENV)/.train  ## Render data, train evaluator and denoiser, distil (three hours on 2 cores; TRIAL=FOLDER: two minutes, there)
	BIN=$(BIN) sh trainer/from_nothing.sh

test: $(VENV)/.dev  ## The tests
	$(BIN)/python -m pytest

test-browser: $(VENV)/.browser  ## The page's tests, in a Chromium
	BIN=$(BIN) sh tests_browser/setup.sh
	$(BIN)/python -m pytest tests_browser

compose-test: $(VENV)/.dev  ## The deployment: docker compose up --build, a worker killed, what containers may do (three minutes)
	$(BIN)/python -m pytest --override-ini timeout=900 deploy/compose_test.py

scaling-out-test: $(VENV)/.dev  ## Workers on two hosts against one Redis, with TLS and s3://, in network namespaces (a minute or two)
	command -v redis-server || (apt-get update -qq && apt-get install -y -qq --no-install-recommends redis-server)
	unshare --map-root-user --net $(BIN)/python -m pytest deploy/hosts_test.py

kubernetes-check: $(VENV)/.kubernetes  ## deploy/kubernetes against Kubernetes' and KEDA's schemas, and the code
	command -v kustomize || command -v kubectl || (apt-get update -qq && apt-get install -y -qq --no-install-recommends kustomize)
	$(BIN)/python -m pytest deploy/kubernetes_test.py

screenshots: $(VENV)/.browser  ## docs/page-*.png, of the page on the shipped checkpoint
	BIN=$(BIN) sh tests_browser/setup.sh
	$(BIN)/python -m tests_browser.screenshots

check: $(VENV)/.dev  ## Lint, format, types; the import rules are among the tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_architecture.py

format: $(VENV)/.dev  ## Format, and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: bench bench-quick
bench: $(VENV)/.bench  ## All is measured (25 minutes at most; goes on where it was interrupted): docs/performance.md, docs/scaling.md
	$(BIN)/python -m benchmarks.run

bench-quick: $(VENV)/.bench  ## The same with small sizes, in two to three minutes, into runs/bench-quick
	$(BIN)/python -m benchmarks.run --quick

.PHONY: fuzz
fuzz: $(VENV)/.dev  ## Random requests by the OpenAPI document, random files, zips, recipes, addresses (three to five minutes)
	$(BIN)/python -m pytest -m hypothesis --hypothesis-profile long --override-ini timeout=3600

.PHONY: faults
faults: $(VENV)/.worker  ## Real processes killed, paused, filled, clocks moved (about eight minutes): docs/reliability.md
	sh faults/setup.sh
	$(BIN)/python -m faults

clean:  ## Remove the virtual environment and caches; data, runs and models stay
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache *.egg-info
