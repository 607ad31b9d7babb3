# Two commands a reader needs: `make train` and `make test`. Both build the environment first if need be.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/

# More threads than cores make small operations tens of times slower.
CORES := $(shell nproc 2>/dev/null || echo 2)
export OMP_NUM_THREADS ?= $(CORES)
export NUMBA_NUM_THREADS ?= $(CORES)

TRAIN ?= --compare --overwrite
.PHONY: train test fast lint matrix clean

# The environment is rebuilt when what it is made of changes. --no-build-isolation is not needed: hatchling is small.
.venv: $(VENV)/.ready
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN)pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

train: .venv
	$(RUN)dibit train --out runs/first $(TRAIN)

# A worker a core, each on one thread: most tests are small operations. The GPU's kernels are interpreted in a run of
# their own: Triton reads that switch when it is imported.
test: .venv
	OMP_NUM_THREADS=1 $(RUN)pytest -n $(CORES) --dist loadgroup $(ARGS)
	$(if $(ARGS),,TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(RUN)pytest -n $(CORES) tests/gpu/test_values.py)

# What is quick, in under two minutes: for every save.
fast: .venv
	OMP_NUM_THREADS=1 $(RUN)pytest -n $(CORES) -m "not (slow or statistics or zoo)" $(ARGS)

lint: .venv
	$(RUN)ruff check .
	$(RUN)ruff format --check .
	$(RUN)mypy

# The tests' core on several versions of Python and torch; makes the table of docs/versions.md.
matrix:
	$(PYTHON) .ci/matrix.py $(ARGS)

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache
