# `make train` and `make test` are all that a newcomer needs; each makes .venv first.

PYTHON ?= python3
VENV ?= .venv
# Arguments of `pip install`. With torch here, nothing else pulls in another build of it:
#   make setup TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0
OUT ?= out
RANKS ?= 2
JOBS ?= 2
TRAIN_FLAGS ?=

# One thread a process: ranks and test workers share the cores.
export OMP_NUM_THREADS ?= 1

BIN := $(VENV)/bin
LOG := $(VENV)/install.log
NATIVE := CMakeLists.txt $(wildcard csrc/*.* csrc/*/*.*)
CXX_FILES := $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu)
CUDA_FILES := $(wildcard csrc/cuda/*.cu) csrc/register_cuda.cpp

.PHONY: help setup train test lint cuda-check gpu clean
.DELETE_ON_ERROR:

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

setup: $(VENV)/.installed  ## make .venv with torch, qsdp and its tools

# A stamp is the last thing that a recipe writes, so a failed step is taken again.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install $(TORCH)
	$(BIN)/pip install "scikit-build-core>=1.0" cmake ninja
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml $(NATIVE)
	@echo "installing qsdp and what it needs (log: $(LOG))"
	@$(BIN)/pip install -v --no-build-isolation -e ".[train,dev]" > $(LOG) 2>&1 \
	  || { grep -o 'qsdp: the native library .*' $(LOG) || tail -n 60 $(LOG); exit 1; }
	@grep -o 'qsdp: the native library .*' $(LOG) || echo "qsdp: the native library was built"
	@grep -o 'qsdp: the CUDA kernels .*' $(LOG) || true
	@touch $@

train: setup  ## train the nano GPT on two processes: 8-bit wire, CrAM; results in out/
	$(BIN)/torchrun --standalone --nproc-per-node $(RANKS) launch/train_gpt.py \
	  --model nano --data stdlib --steps 1000 --qsdp-bits 8 --cram --out $(OUT) $(TRAIN_FLAGS)

test: setup  ## run every test
	$(BIN)/python -m pytest tests -n $(JOBS)
	$(BIN)/python -m pytest tests_distributed

lint: setup  ## formatting, lint rules and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(if $(CXX_FILES),$(BIN)/clang-format --dry-run -Werror $(CXX_FILES))
	$(BIN)/mypy

cuda-check: setup  ## compile the CUDA sources with warnings as errors (no GPU needed)
	@sh .ci/cuda-check $(BIN)/python $(CUDA_FILES)

gpu: setup  ## on a machine with a GPU: build the CUDA kernels, run their tests, measure
	@.ci/gpu $(abspath $(BIN)/python)

clean:  ## remove .venv, build leftovers and results
	rm -rf $(VENV) build dist $(OUT) qsdp/_qsdp_native.so
