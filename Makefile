# Each target sets up what it needs: a virtual environment in .venv, with the dependencies of that target at the versions of
# lock/requirements.txt. lock/install.sh says which build of torch that brings (TORCH_INDEX).
#
# Any Python from 3.11 to 3.14 that can make virtual environments; the first one that is here, unless PYTHON=... names another.
PYTHONS := python3.11 python3.12 python3.13 python3.14 python3
FITS := import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))
PYTHON ?= $(shell for one in $(PYTHONS); do if $$one -c '$(FITS)' 2>/dev/null; then echo $$one; break; fi; done)
NO_PYTHON := { echo "no Python from 3.11 to 3.14 with venv is here (Debian: python3-venv); set PYTHON to one" >&2; exit 1; }
VENV := .venv
BIN := $(VENV)/bin
# Without byte code every process would compile torch anew, for two seconds and more.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo serve train test test-browser compose-test scaling-out-test alert-drill pages-test own-data-test kubernetes-check screenshots check \
  check-lowest format clean docs lock audit bench bench-quick gpu-report fuzz faults anywhere wheel wheel-test soak flood

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | sort

$(VENV)/.%: pyproject.toml lock/requirements.txt lock/uv.txt
	test -x $(BIN)/python || $(if $(PYTHON),$(PYTHON) -m venv $(VENV),$(NO_PYTHON))
	sh lock/install.sh $(BIN)/python $*
	touch $@

demo: $(VENV)/.demo  ## Start everything, draw eight label lists, print the verdicts, write grid.png
	$(BIN)/python -m service demo

serve: $(VENV)/.worker  ## Redis, a worker and the API on http://127.0.0.1:8000
	$(BIN)/python -m service

train: $(VENV)/.train  ## Make every i-CLEVR model from nothing, by trainer/recipes/iclevr.sh (hours; FORM=short for fewer steps; with TRIAL=FOLDER a few minutes, all of it in that folder)
	BIN=$(BIN) sh trainer/recipes/iclevr.sh

# Some tests wait for processes and for time to pass: three of these share two cores.
TEST_PROCESSES = $(shell expr 3 \* $$(getconf _NPROCESSORS_ONLN) / 2)

test: $(VENV)/.dev  ## The tests, on all cores
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

test-browser: $(VENV)/.browser  ## Test the page in Chromium
	BIN=$(BIN) sh tests_browser/setup.sh
	$(BIN)/python -m pytest tests_browser

compose-test: $(VENV)/.dev  ## Test docker compose: build, start, kill a worker, check what containers may do, recovery (eight minutes)
	$(BIN)/python -m pytest --override-ini timeout=900 deploy/compose_test.py

scaling-out-test: $(VENV)/.dev  ## Test workers on two hosts with one Redis, TLS and s3://, in network namespaces (two minutes)
	command -v redis-server || (apt-get update -qq && apt-get install -y -qq --no-install-recommends redis-server)
	unshare --map-root-user --net $(BIN)/python -m pytest deploy/hosts_test.py

alert-drill: $(VENV)/.dev  ## Break a service in each way that an alert is for, and see Prometheus and Alertmanager tell (five minutes)
	command -v prometheus-alertmanager && command -v prometheus || (apt-get update -qq && apt-get install -y -qq --no-install-recommends prometheus prometheus-alertmanager)
	$(BIN)/python -m pytest --override-ini timeout=900 deploy/alerts_test.py

pages-test: $(VENV)/.dev $(VENV)/.demo  ## Run every command of README.md and the tracks of docs/ in empty machines of namespaces, as root (ten minutes)
	command -v prometheus-alertmanager && command -v nginx && command -v redis-server || (apt-get update -qq && apt-get install -y -qq --no-install-recommends curl nginx openssl prometheus prometheus-alertmanager redis-server)
	unshare --net --mount $(BIN)/python -m pytest --override-ini timeout=1800 deploy/pages_test.py

own-data-test: $(VENV)/.dev  ## Import, train and serve 2,000 pictures of each kind, by docs/own-data.md (ten minutes; MINUTES=5 of each training: half an hour)
	$(BIN)/python -m pytest -s --override-ini timeout=7200 deploy/own_data_test.py

kubernetes-check: $(VENV)/.kubernetes  ## Check deploy/kubernetes against the schemas of Kubernetes, KEDA and the Prometheus operator, and against the code
	command -v kustomize || command -v kubectl || (apt-get update -qq && apt-get install -y -qq --no-install-recommends kustomize)
	$(BIN)/python -m pytest deploy/kubernetes_test.py

screenshots: $(VENV)/.browser  ## Take the screenshots docs/page-*.png
	BIN=$(BIN) sh tests_browser/setup.sh
	$(BIN)/python -m tests_browser.screenshots

check: $(VENV)/.dev  ## Lint, formatting, types, import rules (under 30 seconds)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check-lowest:  ## Run the tests with the lowest versions that pyproject.toml allows (torch: the lock's version)
	PYTHON=$(PYTHON) sh lock/check_lowest.sh

docs: $(VENV)/.docs  ## Build the documentation's site, with the Python reference, into build/site
	$(BIN)/python deploy/docs_site.py
	$(BIN)/zensical build --clean --strict

lock: $(VENV)/.dev  ## Write the lock files anew after a change of pyproject.toml; UPGRADE=--upgrade renews every pin
	sh lock/update.sh $(BIN)/python $(UPGRADE)

audit: $(VENV)/.audit  ## Look up the locked versions in PyPI's database of vulnerabilities
	sh lock/audit.sh $(BIN)/python

format: $(VENV)/.dev  ## Format the code and fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.bench  ## Run all benchmarks (half an hour), write docs/performance.md
	$(BIN)/python -m benchmarks.run

bench-quick: $(VENV)/.bench  ## Run the benchmarks at small sizes (three minutes), write to runs/bench-quick
	$(BIN)/python -m benchmarks.run --quick

gpu-report: $(VENV)/.bench  ## On a machine with a GPU: its tests, ten minutes of training, sampling; write docs/gpu.md
	$(BIN)/python -m benchmarks.gpu_report

HISTORIES ?= 300
fuzz: $(VENV)/.dev  ## Fuzz the API, label files, zips, recipes and the life of jobs (seven minutes; HISTORIES=10000 of jobs: half an hour)
	HISTORIES=$(HISTORIES) $(BIN)/python -m pytest -m hypothesis --hypothesis-profile long --override-ini timeout=36000

faults: $(VENV)/.worker  ## Kill, pause and fill real processes and move their clocks (eight minutes), write docs/reliability.md
	sh faults/setup.sh
	$(BIN)/python -m faults

anywhere: $(VENV)/.dev  ## Fail every place that calls Redis, storage, the network ... and check that only it suffers (an hour), write docs/reliability.md
	$(BIN)/python -m faults.anywhere

wheel: $(VENV)/.client  ## Build the wheel, with the weights, into dist/
	rm -rf dist build
	$(BIN)/python -m uv build --quiet --wheel --build-constraint lock/requirements.txt --out-dir dist

wheel-test: wheel  ## Install the wheel into an empty environment and draw a picture with it (PYTHON=python3.12 for another Python)
	sh deploy/wheel_test.sh $(PYTHON) dist/labelgrid-*.whl

MINUTES ?= 60
flood: $(VENV)/.dev  ## Send the worst of each route in parallel from one key: the memory of API and worker has limits (five minutes)
	$(BIN)/python -m soak.flood

soak: $(VENV)/.dev  ## Keep a service under load and random faults for MINUTES=60, check that memory is flat, write docs/reliability.md
	$(BIN)/python -m soak --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))

clean:  ## Remove the virtual environment and caches; keep data, runs and models
	rm -rf $(VENV) .venv-lowest .pytest_cache .mypy_cache .ruff_cache *.egg-info build dist
