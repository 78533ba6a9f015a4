# Everything runs in an environment of its own, made on first use.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest
# What is promised for the oldest versions; with transformers 4.57 the ways in without the command line.
OLDEST_WAYS_IN := tests/callbacks/test_foreign_projects.py tests/callbacks/test_gate_callback.py \
	tests/callbacks/test_model_search.py tests/test_plain_pytorch.py tests/test_transformers_callback.py \
	tests/test_internals.py tests/test_versions.py
# Models of the zoo are made from configurations that transformers 5.0 does not have.
OLDEST_TESTS := tests/core --ignore tests/core/test_branches.py --ignore tests/core/test_experts.py \
	--ignore tests/core/discovery/test_probe_inputs.py \
	--deselect tests/core/test_in_force.py::test_experts_without_tokens_are_told_at_the_end \
	tests/callbacks/test_life_cycle.py tests/cli/test_merging.py tests/checkpoints/test_resume.py \
	tests/cli/test_cli.py::test_fit_then_evaluate_predict_resume_and_merge $(OLDEST_WAYS_IN)
MODEL := .cache/quickstart/SmolLM2-135M-Instruct

.DEFAULT_GOAL := help
.PHONY: help install quickstart gemma digits test test-oldest zoo faults soak fuzz-data fuzz-options evidence wheel docs check format benchmark clean

help: ## Show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-12s %s\n", $$1, $$2}'

install: $(VENV)/.installed ## Make the environment

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[quickstart,test,dev]'
	@touch $@

quickstart: install ## Fine-tune the pretrained SmolLM2-135M-Instruct with NA-LoRA on a CPU
	$(BIN)/python examples/quickstart/prepare.py
	$(BIN)/na-lora fit --config configs/quickstart.yaml

gemma: install ## Fine-tune Gemma 3 270M (GeGLU) on the same riddles; Gemma's terms apply
	$(BIN)/python examples/quickstart/prepare.py --model gemma3-270m
	$(BIN)/na-lora fit --config configs/gemma3_270m.yaml

digits: install ## Give SmolLM2 a vision tower, train it on real images, fine-tune all of it with NA-LoRA
	$(BIN)/python examples/vlm_digits/run.py

# A process for each core, at most four: each holds its own torch.
IN_PARALLEL := --numprocesses auto --maxprocesses 4 --dist loadfile
test: install ## Run the tests
	$(BIN)/python -m pytest $(IN_PARALLEL)

test-oldest: $(OLDEST)/.installed ## Run a part of the tests on the oldest versions, in an environment of its own
	$(OLDEST)/bin/python -m pytest $(IN_PARALLEL) $(OLDEST_TESTS)
	PYTHONPATH=$(OLDEST)/transformers4 $(OLDEST)/bin/python -m pytest $(IN_PARALLEL) $(OLDEST_WAYS_IN)

$(OLDEST)/.installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-oldest.txt -e '.[test]'
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
		--target $(OLDEST)/transformers4 transformers==4.57.1 huggingface_hub==0.34.0
	@touch $@

ZOO ?= causal-lm image-text-to-text seq2seq masked-lm text-encoding image-classification speech diffusers
zoo: install ## Check gates on a tiny model of every type of transformers, and write docs/model_zoo.md
	cd tests && ../$(BIN)/python -m zoo.report --jobs 2 $(ZOO:%=--mapping %) --output ../docs/model_zoo.md

faults: install ## Kill na-lora fit a hundred times, resume, compare bitwise, and write docs/faults.md
	cd tests && ../$(BIN)/python -W ignore -m faults.campaign --kills 100 --output ../docs/faults.md

soak: install ## 2,000 steps and 20 fits: memory and hooks, written to docs/faults.md
	cd tests && ../$(BIN)/python -W ignore -m faults.soak --output ../docs/faults.md

fuzz-data: install ## A thousand odd data files: none trains on other text than is written, none ends in a traceback
	cd tests && ../$(BIN)/python -W ignore -m fuzz.data_files --files 1000

fuzz-options: install ## Five hundred random combinations of options: each is right, or one sentence
	cd tests && ../$(BIN)/python -W ignore -m fuzz.options --combinations 500

evidence: $(VENV)/.study ## Write docs/evidence.md, docs/evidence_tables.md and their figures from the study's results
	$(BIN)/python -m benchmarks.study evidence

$(VENV)/.study: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[study]'
	@touch $@

wheel: $(VENV)/.installed ## Build the wheel, install it into an empty environment, and run the quick start's commands there
	$(BIN)/python examples/quickstart/prepare.py
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	$(PYTHON) -m venv --clear build/wheel
	build/wheel/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt dist/*.whl
	examples/quickstart/installed.sh build/wheel/bin $(MODEL) .cache/quickstart/data

docs: $(VENV)/.docs ## Build the documentation's site in build/site
	$(BIN)/python -m sphinx -W --keep-going -b html docs build/site

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@touch $@

check: install ## Lint, format check, which part imports which, and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy

format: install ## Format the code
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# Another environment may have TRL beside what this one has.
BENCHMARK_PYTHON ?= $(BIN)/python
benchmark: install ## Steps, operations and tokens a second beside PEFT, transformers' Trainer and TRL: docs/benchmarks.md
	test -f $(MODEL)/config.json || $(BIN)/python examples/quickstart/prepare.py
	-OMP_NUM_THREADS=1 $(BENCHMARK_PYTHON) -W ignore benchmarks/lora_step.py --output benchmarks/results/step.json
	-$(BENCHMARK_PYTHON) -W ignore benchmarks/lora_operations.py --output benchmarks/results/operations.json
	OMP_NUM_THREADS=1 $(BENCHMARK_PYTHON) -W ignore benchmarks/growth.py
	OMP_NUM_THREADS=1 $(BENCHMARK_PYTHON) -W ignore benchmarks/frameworks.py --model $(MODEL)
	OMP_NUM_THREADS=1 $(BENCHMARK_PYTHON) -W ignore benchmarks/curves.py --model $(MODEL) --blocks 4
	$(BENCHMARK_PYTHON) benchmarks/page.py

clean: ## Remove the environment and caches, not what was trained
	rm -rf $(VENV) $(OLDEST) .pytest_cache .mypy_cache .ruff_cache .hypothesis
