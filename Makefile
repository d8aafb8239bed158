# The commands of the README. Each makes its own .venv first where it is missing.
#   make demo   post-train the shipped base model, from a notebook (the main job)
#   make test   every test;  make check  the quick ones (under 5 minutes)
#   make lab    JupyterLab on notebooks/;  make lint  format and contracts;  make lock  resolve the pins again
#   make hooks  once per clone: notebooks without outputs, readable diffs

PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
STAMP   = $(VENV)/.installed
# Two processes of tests: each takes up to 8 GiB while its ranks run.
SIDE_BY_SIDE ?= -n 2 --dist loadfile

export PIP_DISABLE_PIP_VERSION_CHECK = 1
export WANDB_MODE ?= offline
export HF_HUB_OFFLINE ?= 1
# Compiled modules are kept: without them every rank, kernel and command compiles torch anew, more than half its start.
export PYTHONDONTWRITEBYTECODE =

.PHONY: setup demo test check lab lint format lock hooks clean

setup: $(STAMP)

# requirements.lock is the whole resolved set, so nothing is resolved here: --no-deps, quick and always the same.
# torch_npu goes into a folder of its own: beside torch, and without CANN, it breaks every `import torch`.
$(STAMP): requirements.lock requirements-ascend.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "error: $(PYTHON) is missing or older than 3.11: name a newer one, as in make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-deps --no-compile -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --no-compile -e .
ifeq ($(shell uname -s),Linux)
	$(BIN)/python -m pip install --quiet --no-deps --no-compile --upgrade --target $(VENV)/ascend -r requirements-ascend.lock
endif
	touch $@

demo: $(STAMP)
	$(BIN)/lab notebook 10_sft

test: $(STAMP)
	$(BIN)/python -m pytest tests $(SIDE_BY_SIDE)

check: $(STAMP)
	$(BIN)/python -m pytest tests $(SIDE_BY_SIDE) -m "not slow"

lab: $(STAMP)
	$(BIN)/jupyter lab --notebook-dir=notebooks --ip=127.0.0.1 --KernelManager.transport=ipc --LabApp.news_url=None \
	    --LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate --LabApp.extension_manager=readonly

lint: $(STAMP)
	$(BIN)/ruff format --check . && $(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/nbstripout --verify notebooks/*.ipynb

format: $(STAMP)
	$(BIN)/ruff format . && $(BIN)/ruff check --fix .
	$(BIN)/nbstripout notebooks/*.ipynb

lock:
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/pip install --quiet $$(sed -n 's/^ *"\(torch==[^"]*\)".*/\1/p' pyproject.toml)
	.venv-lock/bin/python tools/lock.py
	rm -rf .venv-lock

# Once per clone: notebooks are stripped of their outputs as they are committed, and compared and merged cell by cell.
# .gitattributes says which files; here is what the names in it mean, by absolute path: git runs outside of the .venv.
hooks: $(STAMP)
	-$(BIN)/nbstripout --uninstall 2>/dev/null
	git config filter.nbstripout.clean '"$(abspath $(BIN))/nbstripout"'
	git config filter.nbstripout.smudge cat
	git config diff.jupyternotebook.command '"$(abspath $(BIN))/git-nbdiffdriver" diff --use-filter --ignore-id'
	git config merge.jupyternotebook.name 'notebooks, cell by cell'
	git config merge.jupyternotebook.driver '"$(abspath $(BIN))/git-nbmergedriver" merge %O %A %B %L %P'
	@echo 'notebooks: stripped when committed; git diff and git merge know cells (git diff --no-ext-diff shows JSON)'

clean:
	rm -rf $(VENV) .venv-lock build *.egg-info
