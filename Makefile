# Everything a developer types. `make` alone lists it.

PYTHON ?= python3
OUT ?= demo-out
MINUTES ?= 30

BIN := .venv/bin
INSTALLED := .venv/.installed
SOURCES := boomerang_batch tests benchmarks k8s examples

# Without cached bytecode every process that imports torch and diffusers spends 20 s compiling it anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help .venv demo test test-chaos test-s3 test-cloud test-cluster test-faces test-browser soak test-k8s test-k8s-api check lint format types docs build clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[.a-z0-9-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo '  PYTHON=python3.12 chooses the interpreter of a new .venv, OUT=folder where the demo writes.'

.venv: $(INSTALLED)  ## Install the pinned environment into .venv (the other targets do it when needed)

# uv finds local wheels only when told, so it is told what pip is told; where nothing is set, this is empty.
$(INSTALLED): pyproject.toml constraints.txt
	@echo 'installing into .venv'
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt uv
	@UV_FIND_LINKS="$(PIP_FIND_LINKS)" $(BIN)/uv pip install --quiet --python $(BIN)/python \
		-c constraints.txt --build-constraints constraints.txt -e '.[dev,text]'
	@touch $@

demo: $(INSTALLED)  ## Make an anonymized twin of a small real dataset, with the shipped model
	@$(BIN)/boomerang-batch demo $(OUT)

# Processes of one thread each, for threads that wait for each other would spin; one more than two cores can serve, for
# those that start Ray or kill processes mostly wait. Tests that measure time themselves go one by one.
TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
TESTS_BESIDE := $(TESTS) -n 3 --dist worksteal

test: $(INSTALLED)  ## Run every test
	@$(TESTS_BESIDE) -m 'not alone'
	@$(TESTS) -m alone $$(grep -l 'mark\.alone' tests/*.py)

test-chaos: $(INSTALLED)  ## The kill test in its long form: 20 workers and 5 drivers killed, some ten minutes
	@BOOMERANG_CHAOS=long $(BIN)/python -m pytest tests/test_ray.py -k kills

# What the lanes alone need: object stores, and the clients of them.
LANES := .venv/.lanes
$(LANES): $(INSTALLED)
	@UV_FIND_LINKS="$(PIP_FIND_LINKS)" $(BIN)/uv pip install --quiet --python $(BIN)/python \
		-c constraints.txt --build-constraints constraints.txt -e '.[dev,text,lanes]'
	@touch $@

test-s3: $(LANES)  ## Storage and the demo on a real S3 server, with faults on the way; some forty minutes
	@$(BIN)/python -m pytest -m lane tests/lanes/test_s3_*.py tests/lanes/test_http.py

test-cloud: $(LANES)  ## The same demo on Azurite (from npm) and fake-gcs-server; some ten minutes
	@$(BIN)/python -m pytest -m lane tests/lanes/test_cloud.py

test-cluster: $(INSTALLED)  ## Jobs on Ray nodes that die, leave, join and hang; needs root; some ten minutes
	@$(BIN)/python -m pytest -m lane tests/lanes/test_cluster.py

FACES := .venv/.faces
$(FACES): $(INSTALLED)
	@UV_FIND_LINKS="$(PIP_FIND_LINKS)" $(BIN)/uv pip install --quiet --python $(BIN)/python \
		-c constraints.txt --build-constraints constraints.txt -e '.[dev,text,faces]'
	@touch $@

test-faces: $(FACES)  ## dlib's faces on photographs of 40 people, fetched once; some three minutes
	@$(BIN)/python -m pytest -m lane tests/lanes/test_faces.py

test-browser: $(LANES)  ## Reports in a real Chromium, on PATH or where CHROMIUM says; some two minutes
	@$(BIN)/python -m pytest -m lane tests/lanes/test_report_browser.py

soak: $(LANES)  ## Kills of workers, nodes, driver and store for MINUTES=30 at least, into benchmarks/results
	@$(BIN)/python benchmarks/soak.py --minutes $(MINUTES)

test-k8s: $(INSTALLED)  ## RayJobs against KubeRay's definitions, which KUBERAY_CRDS must lead to
	@$(BIN)/python -m pytest -m lane tests/lanes/test_k8s_crds.py

test-k8s-api: $(INSTALLED)  ## The same, and the launcher, on a real API server: ETCD, APIEXTENSIONS_APISERVER
	@$(BIN)/python -m pytest -m lane tests/lanes/test_k8s_api.py

check: lint types  ## Before each commit: format, lint, types, layering, docs freshness, fast tests
	@$(TESTS_BESIDE) -m 'not slow'

lint: $(INSTALLED)  ## Check formatting and lint rules
	@$(BIN)/ruff format --check $(SOURCES)
	@$(BIN)/ruff check $(SOURCES)

format: $(INSTALLED)  ## Rewrite the code in the project's format, and fix what lint can fix
	@$(BIN)/ruff format $(SOURCES)
	@$(BIN)/ruff check --fix $(SOURCES)

types: $(INSTALLED)  ## Check types with mypy --strict
	@$(BIN)/mypy --strict

docs: $(INSTALLED)  ## Regenerate docs/cli.md from the commands' own --help
	@$(BIN)/python -m boomerang_batch.cli.reference docs/cli.md

build: $(INSTALLED)  ## Build the wheel into dist/
	@UV_FIND_LINKS="$(PIP_FIND_LINKS)" $(BIN)/uv build --quiet --wheel --build-constraints constraints.txt
	@ls dist/*.whl

clean:  ## Remove build products and tool caches; .venv and outputs stay
	@rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +
