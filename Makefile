# make book   install, then execute every chapter on the embedded default (no network beyond the package index, no GPU)
# make test   install, then run the notebooks as tests, then tests/
# make lab    install, then open JupyterLab on the chapters
PYTHON ?= python3
PRESET ?= quick
BIN := .venv/bin
READY := .venv/.ready

.PHONY: book test lab export hooks clean help
help:
	@sed -n 's/^# //p' Makefile

book: $(READY)
	$(BIN)/dinocls run --preset $(PRESET)

test: $(READY)
	rm -rf outputs/smoke
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers $$($(BIN)/python -c 'import dinocls.kit.machine as m; print(min(m.cores(), 8))')
	$(BIN)/python -m pytest -q tests

lab: $(READY)
	$(BIN)/jupyter lab --notebook-dir nbs

# After changing a notebook: outputs away, library and README written anew.
export: $(READY)
	$(BIN)/nbdev_clean
	$(BIN)/nbdev_export
	$(BIN)/dinocls sync

hooks: $(READY)
	$(BIN)/nbdev_install_hooks

# The environment, with torch and torchvision from one index so that their builds match.
$(READY): settings.ini setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "dinocls needs Python 3.10 or newer, and $(PYTHON) is $$($(PYTHON) --version 2>&1); name another, as in: make book PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || { echo "The virtual environment could not be made; on Debian and Ubuntu, install python3-venv first."; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $(READY)

clean:
	rm -rf .venv outputs/*/stages outputs/*/html outputs/smoke
