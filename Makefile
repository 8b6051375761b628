# `make train` and `make test` are all that a newcomer needs; each makes .venv first.

PYTHON ?= python3
VENV ?= .venv
# Arguments of `pip install`. With torch here, nothing else pulls in another build of it:
#   make setup TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
OWN_TORCH := torch==2.13.0
TORCH ?= $(OWN_TORCH)
OUT ?= out
RANKS ?= 2
# Workers of the tests, which wait for processes more than they compute.
JOBS ?= 3
# The GPUs that cuda-check compiles for: A100, H100 and H200, B200.
GPUS ?= 80 90 100
TRAIN_FLAGS ?=

# The folder for reports of the tests: JUnit's, and what the workers of tests_distributed came to.
QSDP_TEST_REPORT ?= $(CURDIR)/build/reports
export QSDP_TEST_REPORT

# The test of two ranks that the quick ones end with.
SMOKE ?= tests_distributed/fsdp/test_install.py::test_remove_restores_fsdp2_exactly[True]

# What `make test-torch` chooses from other files than those of install and CrAM, as pytest's -k has
# it: resumes, process groups of two hops, what is freed, and the bytes of the kernels.
OTHER_CHOICE ?= killed_runs or meet_beside or was_dropped or (bytes_and_values and fp32) or opcheck

# One thread a process: ranks and test workers share the cores.
export OMP_NUM_THREADS ?= 1

# Every process would compile qsdp and the tests anew, which takes it a second.
unexport PYTHONDONTWRITEBYTECODE

BIN := $(VENV)/bin
LOG := $(VENV)/install.log
NATIVE := CMakeLists.txt $(wildcard csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu)
CXX_FILES := $(wildcard csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu)
CUDA_FILES := $(wildcard csrc/cuda/*.cu csrc/cuda/*.cpp)

.PHONY: help setup train quick test test-quick test-smoke test-rest test-recipes test-all test-torch test-integrations lint cuda-check gpu wheel clean
.DELETE_ON_ERROR:

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 20

setup: $(VENV)/.installed  ## make .venv with torch, qsdp and its tools

# A stamp is the last thing that a recipe writes, so a failed step is taken again.
$(VENV)/.torch:
	PYTHON="$(PYTHON)" VENV="$(VENV)" TORCH="$(TORCH)" docker/steps.sh dependencies
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml $(NATIVE)
	@echo "installing qsdp and what it needs (log: $(LOG))"
	@$(BIN)/pip install -v --no-build-isolation -e ".[train,dev]" > $(LOG) 2>&1 \
	  || { grep -o 'qsdp: the native library .*' $(LOG) || tail -n 60 $(LOG); exit 1; }
	@grep -o 'qsdp: the native library .*' $(LOG) || echo "qsdp: the native library was built"
	@grep -o 'qsdp: the CUDA kernels .*' $(LOG) || true
	@touch $@

train: setup  ## train the nano GPT on two processes: 8-bit wire, CrAM; results in out/
	$(BIN)/torchrun --standalone --nproc-per-node $(RANKS) -m qsdp train \
	  --model nano --data stdlib --steps 1000 --qsdp-bits 8 --cram --out $(OUT) $(TRAIN_FLAGS)

quick: lint test-quick test-smoke  ## lint and the quick tests, for the minute after an edit

test: test-quick test-rest  ## run every test but recipes, emulated kernels and the heavy variants of some

# What runs under pytest, with its report: $(call pytest,NAME,ARGUMENTS).
pytest = $(BIN)/python -m pytest --dist worksteal --junit-xml $(QSDP_TEST_REPORT)/$(1).xml $(2)

test-quick: setup  ## the tests that take a moment
	$(call pytest,quick,tests -m "not slow and not heavy" -n $(JOBS))

test-smoke: setup  ## one training step of two ranks
	$(call pytest,smoke,"$(SMOKE)")

test-rest: setup
	$(call pytest,slow,tests tests_distributed -m "slow and not recipe and not emulated" -n $(JOBS))

test-recipes: setup  ## add one extension of each kind by its recipe in docs/extend
	$(call pytest,recipes,tests -m recipe -n $(JOBS))

test-all: setup  ## every test with every combination: an hour
	$(call pytest,all,tests tests_distributed --all-combinations -n $(JOBS))

# Where another torch is tested: from a copy without qsdp/, so that the installed wheel is imported,
# which the torch of .venv built.
OTHER := $(subst ==,-,$(firstword $(TORCH)))
OTHER_BIN := $(CURDIR)/.venv-$(OTHER)/bin
OTHER_WHOLE := $(addprefix tests_distributed/fsdp/test_,install.py install_refusals.py report.py exact.py) \
  $(addprefix tests_distributed/fsdp/test_,fsdp2_settings.py put_off_averages.py several_wholes.py) \
  $(addprefix tests_distributed/,comm/test_traffic.py methods/test_cram.py)
OTHER_TESTS := tests/ops/test_codec_kernels.py \
  $(addprefix tests_distributed/,train/test_resume.py comm/test_topology.py fsdp/test_lifetime.py)

test-torch:  ## training and resume with another torch: make test-torch TORCH="torch==2.14.1"
	@$(MAKE) setup TORCH="$(OWN_TORCH)"
	test -x $(OTHER_BIN)/torchrun || { $(PYTHON) -m venv .venv-$(OTHER) && $(OTHER_BIN)/pip install $(TORCH); }
	rm -rf build/$(OTHER)
	QSDP_REQUIRE_NATIVE=1 $(BIN)/pip wheel --no-deps --no-build-isolation --wheel-dir build/$(OTHER) .
	$(OTHER_BIN)/pip install --quiet "$$(echo build/$(OTHER)/qsdp-*.whl)[train]" "pytest>=9" pytest-xdist
	$(OTHER_BIN)/pip install --quiet --force-reinstall --no-deps build/$(OTHER)/qsdp-*.whl
	cp -r pyproject.toml docs launch tests tests_distributed build/$(OTHER)
	cd build/$(OTHER) && QSDP_REQUIRE_NATIVE=1 $(OTHER_BIN)/python -c \
	  "import torch, qsdp; from qsdp.ops import native; print('qsdp', qsdp.__file__, native.capability(), 'torch', torch.__version__)"
	cd build/$(OTHER) && export QSDP_REQUIRE_NATIVE=1 QSDP_TEST_REPORT=$(CURDIR)/build/$(OTHER)/reports; \
	  $(OTHER_BIN)/python -m pytest $(OTHER_WHOLE) -n $(JOBS) \
	  && $(OTHER_BIN)/python -m pytest $(OTHER_TESTS) -k "$(OTHER_CHOICE)" -n $(JOBS)

# What adapters are for lies over .venv, which stays as it is: the tests of the library import nothing
# of it but what the dev extra has. pip takes torch, and all else that .venv has, from there.
OVERLAY := $(CURDIR)/.venv-integrations
ADAPTED := import tomllib; extras = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]; \
  print(*sorted({each for name in "accelerate transformers peft lightning torchtitan".split() for each in extras[name]}))

test-integrations: setup  ## train under every library that has an adapter: they go into .venv-integrations
	test -x $(OVERLAY)/bin/pip || $(BIN)/python -m venv $(OVERLAY)
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
	  > $$($(OVERLAY)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/beneath.pth
	$(OVERLAY)/bin/pip install --quiet $(OWN_TORCH) $$($(BIN)/python -c '$(ADAPTED)') trl
	$(OVERLAY)/bin/python -m pytest --dist worksteal --junit-xml $(QSDP_TEST_REPORT)/integrations.xml \
	  tests_distributed/integrations --all-combinations -n $(JOBS)

lint: setup  ## formatting, lint rules and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(if $(CXX_FILES),$(BIN)/clang-format --dry-run -Werror $(CXX_FILES))
	$(BIN)/mypy

cuda-check: setup  ## compile the CUDA sources for GPUS, run their kernels on the host (no GPU needed)
	@sh .ci/cuda-check $(BIN)/python "$(GPUS)" $(CUDA_FILES)
	$(call pytest,emulated,tests -m emulated)

gpu: setup  ## on a machine with a GPU: build the CUDA kernels, run their tests, measure
	@.ci/gpu $(abspath $(BIN)/python)

# What `make wheel` installs besides what builds.
RELEASE_TOOLS := import tomllib; \
  print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["release"])

# The environments of the proof stay in build/proof for the next one: 10 GB with torch for CUDA, which pip
# finds by itself. Small ones come with TORCH_ARGS="--index-url https://download.pytorch.org/whl/cpu".
wheel: $(VENV)/.torch  ## build dist/, and prove the wheel with the oldest and the newest torch
	$(BIN)/pip install --quiet $$($(BIN)/python -c '$(RELEASE_TOOLS)')
	rm -rf build/wheel dist
	QSDP_REQUIRE_NATIVE=1 $(BIN)/python -m build --no-isolation --outdir build/wheel .
	PATH="$(abspath $(BIN)):$$PATH" auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' \
	  --wheel-dir dist build/wheel/qsdp-*.whl
	cp build/wheel/qsdp-*.tar.gz dist
	PYTHON="$(PYTHON)" .ci/prove-wheel dist/qsdp-*.whl oldest newest
	PYTHON="$(PYTHON)" .ci/prove-wheel dist/qsdp-*.tar.gz newest
	@ls -l dist

clean:  ## remove .venv, build leftovers and results
	rm -rf $(VENV) .venv-torch-* .venv-integrations build dist $(OUT) qsdp/_qsdp_native.so qsdp/_qsdp_cuda.so
