# `make help` lists the targets. On Debian or Ubuntu: sudo apt-get install make python3.11 python3.11-venv

PYTHON ?= python3.11
VENV := .venv
VENV_PYTHON := $(VENV)/bin/python
TEST_PROCESSES ?= 2
QUICKSTART_MODEL := runs/quickstart/model.tflite
QUICKSTART_FLOWS := runs/quickstart/flows.tflite

.NOTPARALLEL:
.PHONY: help quickstart quickstart-dense phone test check pytest bazel arm dev format clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 18

quickstart: ## .venv with the pinned dependencies, then train, export, check and measure the small model
	@tools/make_venv.sh "$(PYTHON)" $(VENV) requirements.txt
	PYTHONPATH=. $(VENV_PYTHON) tools/quickstart.py

quickstart-dense: ## the same for a detector and a segmenter, on photographed objects pasted over photographs
	@tools/make_venv.sh "$(PYTHON)" $(VENV) requirements.txt
	PYTHONPATH=. $(VENV_PYTHON) tools/quickstart_dense.py

$(QUICKSTART_MODEL):
	@$(MAKE) quickstart

phone: $(QUICKSTART_FLOWS) ## serve the quickstart's models to the browser of a phone: benchmark, camera, attention flows
	@tools/phone_page.sh
	PYTHONPATH=. $(VENV_PYTHON) -m tflite.benchmark --device=browser --stay --nobeside_host --num_threads=1,4 \
		--graph=$(QUICKSTART_MODEL),runs/quickstart/model_dynamic.tflite --flows=$(QUICKSTART_FLOWS) \
		--output_dir=runs/phone_results || [ $$? = 130 ] # Ctrl-C is how it ends

$(QUICKSTART_FLOWS): $(QUICKSTART_MODEL)
	PYTHONPATH=. $(VENV_PYTHON) -m tflite.flows --checkpoint=runs/quickstart/train --output=$@

test: quickstart check bazel pytest ## everything that CI runs

dev: ## .venv with what `make test` needs
	@tools/make_venv.sh "$(PYTHON)" $(VENV) requirements-dev.txt

check: dev ## ruff (rules and format) and mypy
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m ruff format --check .
	$(VENV)/bin/python -m mypy

pytest: dev | $(QUICKSTART_MODEL) ## every test, the slow ones too
	@if [ "$$CI" = true ] || command -v npm >/dev/null; then tools/phone_page.sh; fi
	$(VENV)/bin/python -m pytest --numprocesses=$(TEST_PROCESSES) --dist=loadfile --durations=40

bazel: dev | $(QUICKSTART_MODEL) ## build //..., test //tests/..., run //tflite:benchmark on the quickstart's model
	@tools/run_bazel.sh "$(CURDIR)/$(VENV_PYTHON)" $(QUICKSTART_MODEL)

arm: dev ## count the instructions of the aarch64 runtime in an emulator, compare with docs/arm.json
	@PYTHON="$(CURDIR)/$(VENV_PYTHON)" tools/arm/setup.sh
	PYTHONPATH=. $(VENV_PYTHON) benchmarks/arm.py --check

format: dev ## rewrite the files as `make check` wants them
	$(VENV)/bin/python -m ruff check --fix .
	$(VENV)/bin/python -m ruff format .

clean: ## remove caches and build results; .venv and runs/ stay
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
