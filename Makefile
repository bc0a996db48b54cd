# make book         install, then execute every chapter on the embedded default (no network beyond the package index, no GPU)
# make test         install, then run every test, the notebooks among them
# make check        install, then look over the code and run the tests that take no time: within a minute
# make site         install, then build the book's site from the committed run into _site
# make lab          install, then open JupyterLab on the chapters; LAB='--no-browser' passes options
# make export       after changing a notebook: outputs away, library and README written anew
# make record       execute a committed run anew, all of it: PRESET=quick, or laptop
# make constraints  take the newest releases of what is required, with their hashes
PYTHON ?= python3
PRESET ?= quick
BIN := .venv/bin
READY := .venv/.ready
CODE = nbs tests benchmarks setup.py dinocls/kit dinocls/app  # the other modules are checked as the notebooks they come from
WORKERS = $$($(BIN)/python -c 'from dinocls.kit.machine import cores; print(min(cores(), 8))')

ROOT = $$(test $$(id -u) = 0 && echo --allow-root)  # as in a container

.PHONY: book test check site lab export record constraints clean help
help:
	@sed -n 's/^# //p' Makefile

book: $(READY)
	$(BIN)/dinocls run --preset $(PRESET)

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal tests

check: $(READY)
	$(BIN)/ruff check --quiet $(CODE)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal -m 'not slow' tests

site: $(READY)
	$(BIN)/dinocls site

lab: $(READY)
	cd nbs && ../$(BIN)/jupyter lab --ContentsManager.pre_save_hook=dinocls.app.lab.as_committed $(ROOT) $(LAB)

export: $(READY)
	$(BIN)/nbdev_clean
	$(BIN)/nbdev_export
	$(BIN)/dinocls sync

record: $(READY)
	rm -rf outputs/record-$(PRESET)
	$(BIN)/dinocls run --preset $(PRESET) --out outputs/record-$(PRESET)
	$(BIN)/dinocls sync

constraints: $(READY)
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile setup.py --extra dev --extra site --universal --python-version 3.10 --generate-hashes --no-header --no-annotate --upgrade --output-file constraints.txt

# The environment: the releases of constraints.txt, each with its hash, then the book itself.
$(READY): constraints.txt settings.ini setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "dinocls needs Python 3.10 or newer, and $(PYTHON) is $$($(PYTHON) --version 2>&1); name another, as in: make book PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || { echo "The virtual environment could not be made; on Debian and Ubuntu, install python3-venv first."; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes --requirement constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $(READY)

clean:
	rm -rf .venv outputs/*/stages outputs/*/html outputs/smoke _site
