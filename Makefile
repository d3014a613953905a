# Verbs: setup demo test check bench tree clean. `make demo` and `make test` set up what they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# What `make bench` measures; a GPU takes SHAPE=llama-3.1-8b CONTEXT=1M
SHAPE ?= smollm2-135m
CONTEXT ?= 4k
TORCH := torch==2.13.0
# Without an NVIDIA GPU the CPU build is taken: its local version (+cpu) sorts above the CUDA build of the same release.
GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
CPU_INDEX := $(if $(GPU),,--extra-index-url https://download.pytorch.org/whl/cpu)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: setup demo test check bench tree clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/pip install -q --retries 1 --no-deps $(CPU_INDEX) '$(TORCH)'
	$(BIN)/pip install -q --retries 1 -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/lcconvert run smoke -o demo

test: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n $(shell nproc) --dist loadfile

check: setup tree
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/lcconvert bench --shape $(SHAPE) --random-weights --context $(CONTEXT)

tree:
	mkdir -p build/tree/lcconvert
	for folder in convert runtime kernels recipes; do ln -sfn ../../../$$folder build/tree/lcconvert/$$folder; done

clean:
	rm -rf build demo .mypy_cache .ruff_cache .pytest_cache .hypothesis
