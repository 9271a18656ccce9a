.DEFAULT_GOAL := help
.PHONY: help setup train meta evaluate evaluate-small test test-bench test-dist test-slow test-kernels test-lowest test-interop docs lint bench report gpu-check data clean
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
LOWEST := .venv-lowest/.installed
INTEROP := build/interop/.installed
DOCS := build/docs/.installed
TYPECHECK := build/typecheck
# options of the program behind a target: make train ARGS="--opt adamw --out-dir runs/adamw"
ARGS ?=
# processes that run tests, each on a thread of its own; tests of several processes run one by one
WORKERS ?= 2
PARALLEL := -n $(WORKERS) --dist worksteal

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-16s%s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

setup: $(INSTALLED) ## install into .venv; the other targets do it when it is missing

train: $(INSTALLED) ## train the nano GPT with Celo2 on the embedded text; resumes an interrupted run (ARGS="...")
	$(BIN)/python pretrain/train_gpt.py --size nano --opt celo2 --resume auto --log-every 10 $(ARGS)

meta: $(INSTALLED) ## meta-train a theta for 400 outer steps on the embedded images; resumes (ARGS="...")
	$(BIN)/python -m celo2.meta.train --recipe celo2-base-short --outer-steps 400 --out-dir runs/meta/demo --resume auto $(ARGS)

evaluate: $(INSTALLED) ## test the bundled thetas beside tuned baselines, about a day, resumable; writes docs/results.md
	$(BIN)/python -m celo2.meta.evaluate $(ARGS)

evaluate-small: $(INSTALLED) ## the paper's evaluations at CPU size, half an hour; writes docs/evaluations.md
	$(BIN)/python bench/evaluate_small.py $(ARGS)

test: $(INSTALLED) ## run the tests, but for the ones below (ARGS="-k golden")
	$(BIN)/python -m pytest -q $(PARALLEL) -m "not kernels and not dist" $(ARGS)

test-bench: $(INSTALLED) ## run the tests of the evaluations, the examples and the command lines, some minutes
	$(BIN)/python -m pytest -q $(PARALLEL) tests/bench tests/test_entry_points.py tests/test_examples.py $(ARGS)

test-dist: $(INSTALLED) ## run the tests on two processes, and on two by two: steps, trainer, launch scripts
	$(BIN)/python -m pytest -q -m "dist and not slow" $(ARGS)

test-slow: $(INSTALLED) ## run the same on one, three and four processes, some minutes
	$(BIN)/python -m pytest -q -m "dist and slow" $(ARGS)

test-kernels: $(INSTALLED) ## run the tests of the kernels, on a GPU or in the interpreter, some minutes
	$(BIN)/python -m pytest -q $(PARALLEL) -m kernels $(ARGS)

$(LOWEST): pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/pip install --disable-pip-version-check -c constraints-lowest.txt -e '.[triton]' 'pytest>=8.0'
	@touch $@

test-lowest: $(LOWEST) ## the rule, its files and its kernels with the lowest NumPy, safetensors and Triton
	.venv-lowest/bin/python -m pytest -q -m "not kernels" tests/celo2/test_golden.py tests/celo2/test_theta.py tests/celo2/test_phases.py $(ARGS)
	.venv-lowest/bin/python -m pytest -q tests/kernels -k "oracle or layout or low_precision or launches or compiled" $(ARGS)

$(INTEROP): pyproject.toml constraints-interop.txt
	$(PYTHON) -m venv build/interop
	build/interop/bin/pip install --disable-pip-version-check -c constraints-interop.txt -e '.[interop]' 'pytest>=8.0'
	@touch $@

test-interop: $(INTEROP) ## train in Trainer, accelerate, Lightning, timm, PEFT and torchtitan, in an environment of their own
	build/interop/bin/python -m pytest tests/interop $(ARGS)

$(DOCS): constraints-docs.txt
	$(PYTHON) -m venv build/docs
	build/docs/bin/pip install --disable-pip-version-check -c constraints-docs.txt mkdocs mkdocs-material 'mkdocstrings[python]'
	@touch $@

docs: $(DOCS) ## the documentation as a site in build/site; a broken link fails
	NO_MKDOCS_2_WARNING=1 build/docs/bin/mkdocs build $(ARGS)

lint: $(INSTALLED) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@# mypy does not see the package mapping of an editable install: lay the package out as it installs
	@rm -rf $(TYPECHECK) && mkdir -p $(TYPECHECK)/celo2
	@ln -s $(CURDIR)/celo2/* $(CURDIR)/kernels $(CURDIR)/meta $(CURDIR)/pretrain $(TYPECHECK)/celo2/
	cd $(TYPECHECK) && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml -p celo2

bench: $(INSTALLED) ## time the optimizer step and the inner steps of meta-training
	$(BIN)/python -m pytest bench/ -q $(ARGS)

report: $(INSTALLED) ## compile the kernels for four GPUs and print what they cost (ARGS="--target sm_90")
	$(BIN)/python -m celo2.kernels.report $(ARGS)

gpu-check: $(if $(SYSTEM),,$(INSTALLED)) ## on a GPU: check and measure, a page in docs/gpu/ (SYSTEM=1: install nothing)
	$(if $(SYSTEM),$(PYTHON),$(BIN)/python) bench/gpu_check.py $(ARGS)

data: $(INSTALLED) ## token shards of the embedded text, for nano (bytes) and the other sizes (GPT-2 BPE)
	$(BIN)/python pretrain/prepare_data.py --embedded --tokenizer bytes --out data/wikipedia-bytes
	$(BIN)/python pretrain/prepare_data.py --embedded --tokenizer gpt2 --out data/wikipedia-gpt2

clean: ## remove the environment, caches and build outputs; data/ and runs/ stay
	rm -rf .venv .venv-lowest build dist *.egg-info .benchmarks .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
