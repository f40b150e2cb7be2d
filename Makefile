# What can be done with this tree; `make` alone lists it.  GNU make.
#
# Each Python has a virtual environment of its own, so that `make demo` and `make demo PYTHON=pypy3` stand side by side.
# Nothing is installed outside of them.

PYTHON ?= python3
VENV   := $(if $(filter python3,$(PYTHON)),.venv,.venv-$(notdir $(PYTHON)))
IN_VENV = $(VENV)/bin/python

.DEFAULT_GOAL := help
.PHONY: help demo test soak fuzz coverage docs bench bench-snapshots guests linux-guest lint clean
.NOTPARALLEL:  # two pip must not write into one environment
.DELETE_ON_ERROR:

help:  ## list what can be made (the default)
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-15s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo "With another Python: make demo PYTHON=pypy3"

demo: $(VENV)/.installed  ## boot a VM, suspend it, restore it, see it go on
	@$(IN_VENV) tools/demo.py

test: $(VENV)/.installed-test  ## run the tests
	$(IN_VENV) -m pytest -n auto

soak: $(VENV)/.installed-test  ## for an hour or two: xv6 and Linux suspended all the time, floods, kills
	$(IN_VENV) -m pytest -n auto -m soak --durations 0

fuzz: $(VENV)/.installed-test  ## compare random instructions with Unicorn, and programs translated and not: make fuzz MINUTES=10
	$(IN_VENV) -m tests.fuzz --minutes '$(MINUTES)'
MINUTES ?= 5

# What proves the instructions, without what needs a VM around them.  In one process: a tracer has to see all of it.
# (Translated, a definition is run on symbols, once: that says little of its lines.)
CPU_TESTS = $(addprefix tests/test_,$(addsuffix .py,core_corners cpuid debug_exceptions fast_calls fpu_state \
    instructions_against_unicorn long_mode_transfers one_definition privilege restart string_moves system_registers \
    task_switch virtual_8086))

coverage: $(VENV)/.installed-coverage  ## show the lines of the instruction files that the tests of the CPU do not reach
	$(IN_VENV) -m coverage run -m pytest -q -p no:cacheprovider -k 'not translated' $(CPU_TESTS)
	$(IN_VENV) -m coverage report

docs: $(VENV)/.installed-docs  ## build the documentation in docs/_build/html
	$(IN_VENV) -m sphinx -W --keep-going -b html docs docs/_build/html

bench: $(VENV)/.installed-bench  ## measure how fast all this is, against Python, Unicorn and QEMU
	$(IN_VENV) bench/bench.py

bench-snapshots: $(VENV)/.installed  ## measure how long guests stand still for a checkpoint, and how soon they are back
	$(IN_VENV) bench/snapshots.py

guests:  ## rebuild the embedded guests from their sources (needs gcc and binutils)
	$(MAKE) -C guests

linux-guest:  ## build the guest Linux 6.1, once, outside of this tree (needs gcc, and Debian's linux-source-6.1)
	$(PYTHON) guests/linux/build.py

lint: $(VENV)/.installed-lint  ## check style, types, and who imports whom
	$(IN_VENV) -m ruff check .
	$(IN_VENV) -m mypy
	$(VENV)/bin/lint-imports --no-logo

clean:  ## remove everything made here, the virtual environments too
	rm -rf .venv .venv-* docs/_build guests/build build *.egg-info
	rm -rf .coverage .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The package is installed in place (--editable), so a change to a .py file is seen at once; only a change to
# pyproject.toml installs again.  .installed holds what a VM needs, .installed-test what the tests need besides, and so on.
PIP_INSTALL = $(IN_VENV) -m pip --disable-pip-version-check install --quiet --editable

$(VENV)/.installed: pyproject.toml | $(VENV)/.made
	@echo "Installing into $(VENV) ..."
	@$(PIP_INSTALL) .
	@touch $@

$(VENV)/.installed-%: pyproject.toml | $(VENV)/.made
	@echo "Installing into $(VENV) what \"make $*\" needs ..."
	@$(PIP_INSTALL) '.[$*]'
	@touch $@

$(VENV)/.made:
	@command -v $(PYTHON) >/dev/null || \
	    { echo "$(PYTHON) was not found; name a Python: make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 9))' || \
	    { echo "$(PYTHON) is older than Python 3.9; name a newer one: make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	    { echo "$(PYTHON) has no venv module (on Debian or Ubuntu: apt install $(notdir $(PYTHON))-venv)" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)
	@touch $@
