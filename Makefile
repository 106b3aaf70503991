# Two commands set everything up and say what they do:
#   make demo                    segment a synthetic embryo and show it in napari (without a display: picture demo.png)
#   make demo IMAGE=stack.tif    the same with your own stack
#   make test                    all tests, those of the windows under a virtual display
# Also: make lint, make bench, make wheels, make install-check, make clean.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.ONESHELL:
.NOTPARALLEL:

VENV := .venv
BIN := $(VENV)/bin
SETUP := tools/setup_env.sh
PARTS := pyproject.toml constraints.txt $(SETUP)
OPS := src/napari_mrcnn3d/_ops
LIBRARY := $(VENV)/.has-library
VIRTUAL := xvfb-run -a -s "-screen 0 1600x1200x24"

.PHONY: help demo test lint bench wheels install-check clean

help:
	@sed -n 's/^#   //p' Makefile

$(VENV)/.has-torch: constraints.txt $(SETUP)
	@$(SETUP) torch $(VENV)
	touch $@

$(VENV)/.has-%: $(VENV)/.has-torch $(PARTS)
	@$(SETUP) package $(VENV) $*
	touch $@

# Without it the operations run in plain PyTorch, so a failure stops nothing; the next call tries again.
$(LIBRARY): $(wildcard $(OPS)/csrc/cpu_*) $(OPS)/csrc/common.h _build/compile_library.py | $(VENV)/.has-torch
	@if $(SETUP) library $(VENV); then touch $@; fi

demo: $(VENV)/.has-all $(LIBRARY)
	@if [ -n "$${DISPLAY:-}$${WAYLAND_DISPLAY:-}" ] || [ "$$(uname)" = Darwin ]; then
	  tools/system_packages.sh qt
	  echo "==> Opening napari"
	  $(BIN)/python tools/demo.py $(if $(IMAGE),--image "$(IMAGE)")
	else
	  tools/system_packages.sh qt xvfb
	  echo "==> No display here: drawing the same window on a virtual one, into demo.png"
	  $(VIRTUAL) $(BIN)/python tools/demo.py $(if $(IMAGE),--image "$(IMAGE)") --screenshot demo.png
	fi

test: $(VENV)/.has-testing $(LIBRARY)
	@tools/run_tests.sh $(BIN)/python $(ARGS)

lint: $(VENV)/.has-testing $(VENV)/.has-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.has-testing $(LIBRARY)
	@echo "Benchmarks; each prints its figures and writes them as JSON:"
	@for file in $$(find bench -name '*.py' ! -name '_*' | sort); do
	  printf '  %s %-32s %s\n' "$(BIN)/python" "$$file" "$$(sed -n '1s/^"""//;1s/"""$$//;1p' "$$file")"
	done

wheels: $(VENV)/.has-torch
	@tools/build_wheels.sh $(BIN)/python $(ARGS)

install-check: $(VENV)/.has-testing
	@tools/check_install.sh $(BIN)/python $(ARGS)

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache $(OPS)/_ops_cpu.*
