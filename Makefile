# make demo   tunes a real model on real data and writes a report (makes its own environment)
# make test   runs every test (makes its own environment)
# make check  lint, types, import rules and the fast tests: under two minutes

VENV ?= .venv
PYTHON ?= python3
export PYTHON
RUN := $(VENV)/bin

.PHONY: demo test check venv bench clean

demo: venv
	@if [ -e runs/demo/config.yaml ]; then $(RUN)/tunesmith tune tunesmith/recipes/toolcall.yaml out=runs/demo --resume; \
	else $(RUN)/tunesmith tune tunesmith/recipes/toolcall.yaml out=runs/demo; fi

test:
	scripts/venv.sh $(VENV) test,check
	$(RUN)/python -m pytest

check:
	scripts/venv.sh $(VENV) test,check
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy
	$(RUN)/lint-imports
	$(RUN)/python -m pytest -m "not real and not slow"

venv:
	scripts/venv.sh $(VENV)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
