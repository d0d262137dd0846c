# `make train` and `make test` do all their own set-up. What they need is taken from the active environment
# where that has it, and installed into .venv otherwise.
SHELL    := /bin/bash
PYTHON   ?= python3
VENV     := .venv
ARGS     ?=
run_needs := torch torchvision fastai fastcore filelock safetensors matplotlib pandas scipy
dev_needs := $(run_needs) nbdev pytest sklearn nbconvert ipykernel tensorboard smalldocs onnxruntime onnxscript selenium selenium_axe_python \
  xdist random_order hypothesis accelerate
bench_needs := $(run_needs) $(if $(filter --all lightning,$(ARGS)),lightning)

# "yes" where the active environment has all modules of $(1), and this checkout as mnist_block3
has = $(shell $(PYTHON) -I -c "import os; from importlib.util import find_spec as f; \
  print('yes' * (all(map(f, '$(1)'.split())) and os.path.samefile(os.path.dirname(f('mnist_block3').origin), 'mnist_block3')))" 2>/dev/null)
active := $(shell $(PYTHON) -c "import sys, pathlib; print(pathlib.Path(sys.executable).parent)")
run_env := $(if $(call has,$(run_needs)),,$(VENV)/.run)
dev_env := $(if $(call has,$(dev_needs)),,$(VENV)/.dev)
bench_env := $(if $(call has,$(bench_needs)),,$(VENV)/$(if $(filter lightning,$(bench_needs)),.bench,.run))
run_bin := $(if $(run_env),$(VENV)/bin,$(active))
dev_bin := $(if $(dev_env),$(VENV)/bin,$(active))
bench_bin := $(if $(bench_env),$(VENV)/bin,$(active))
with_dev = PATH="$(abspath $(dev_bin)):$$PATH"
# nbdev 2 has underscores in the names of its commands, nbdev 3 hyphens; it works on several notebooks at
# once, as pytest does on tests, and threads of torch that outnumber the cores wait for each other, so each gets one
nbdev = $(with_dev) OMP_NUM_THREADS=1 $(if $(wildcard $(dev_bin)/nbdev_$(1)),nbdev_$(1),nbdev-$(subst _,-,$(1)))

.PHONY: help train test quick test-slow test-random bench readme prepare docs docs-serve clean
.ONESHELL:
.SHELLFLAGS := -euo pipefail -c

help: ## Say what there is
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | column -t -s "$$(printf '\t')"

train: $(run_env) ## Train 15 epochs on MNIST; options of block3_train in ARGS="--epochs 1"
	@$(run_bin)/block3_train $(ARGS)

test: $(dev_env) ## Run all notebooks and the tests
	$(call nbdev,test)
	$(with_dev) OMP_NUM_THREADS=1 python -m pytest -n auto $(ARGS)

quick: $(dev_env) ## Run the notebooks that differ from the last commit, and the fastest tests
	for nb in $$(git diff --name-only HEAD -- 'nbs/*.ipynb'); do $(call nbdev,test) --path $$nb; done
	$(with_dev) OMP_NUM_THREADS=1 python -m pytest tests/test_data.py tests/test_model.py tests/test_package.py $(ARGS)

test-slow: $(dev_env) ## Run what `make test` leaves out for its length
	$(call nbdev,test) --flags slow
	$(with_dev) python -m pytest -m 'slow and not cuda' $(ARGS)

test-random: $(dev_env) ## Run the tests in random order
	$(with_dev) OMP_NUM_THREADS=1 python -m pytest -n auto --random-order $(ARGS)

bench: $(bench_env) ## Measure speed against other ways, for a quarter of an hour or more; options in ARGS="--all --whole"
	@$(bench_bin)/python benchmarks/bench.py $(ARGS)

readme: $(dev_env) ## Make README.md from nbs/index.ipynb
	$(with_dev) python tools/readme.py

prepare: $(dev_env) ## What to run before a commit: export, clean, test, readme
	$(call nbdev,export)
	$(call nbdev,clean)
	$(MAKE) test readme

docs: $(dev_env) ## Build the site in _docs
	$(with_dev) python tools/docs.py

docs-serve: docs ## Build the site and show it, at http://localhost:8000 or another PORT=
	$(dev_bin)/python -m http.server $(or $(PORT),8000) --bind 127.0.0.1 --directory _docs

clean: ## Remove what was built: the environment, the site, packages; never your runs
	rm -rf $(VENV) _proc _docs build dist *.egg-info .pytest_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

# installed again when the requirements change
$(VENV)/bin/uv:
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check uv

# $(1) is this project with its extra requirements
define install
@echo "Installing PyTorch, fastai and what they need into $(VENV) (some minutes, several GB) …"
$(VENV)/bin/uv pip install -q --python $(VENV)/bin/python --compile-bytecode -e '$(1)'
touch $@ $(VENV)/.run
endef

$(VENV)/.run: $(VENV)/bin/uv settings.ini setup.py pyproject.toml
	$(call install,.)

$(VENV)/.dev: $(VENV)/bin/uv settings.ini setup.py pyproject.toml
	$(call install,.[dev])

$(VENV)/.bench: $(VENV)/bin/uv settings.ini setup.py pyproject.toml
	$(call install,.[bench])
