# Two commands: `make demo` trains and samples, `make test` proves. Both make their own .venv first.
# `make test-all` adds the kernels' whole matrix of shapes, types and targets.
# Both install the versions of constraints.txt; pyproject.toml says which others are right, too.
# On a machine without a GPU, TORCH_INDEX saves a download of several GB:
#     make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu

PYTHON ?= python3
VENV ?= .venv
PY = $(VENV)/bin/python
INTERPRETED = tests/kernels/interpreter tests/kernels/test_kernels_attention.py \
	tests/kernels/test_kernels_dispatch.py tests/kernels/test_kernels_group_norm_silu.py \
	tests/kernels/test_kernels_sampling_update.py
RUNS = tests/runtime tests/evaluation
INDEX = $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.PHONY: demo test test-all test-runs test-others test-interpreted bench clean

demo: $(VENV)/.installed
	$(PY) ldm_cfg.py

# Three times pytest, two side by side: whole runs, all else, and the kernels once more, for Triton
# decides where a kernel is defined whether it is compiled or interpreted. EVERY adds the slow tests,
# those that are marked and those that tests/slow.txt names.
test: $(VENV)/.installed
	$(PY) -m ruff check .
	$(MAKE) -j2 test-runs test-others test-interpreted

test-all:
	$(MAKE) test EVERY='-m ""'

test-runs: $(VENV)/.installed
	$(PY) -m pytest $(EVERY) $(RUNS)

test-others: $(VENV)/.installed
	$(PY) -m pytest $(EVERY) $(RUNS:%=--ignore=%)

test-interpreted: $(VENV)/.installed
	TRITON_INTERPRET=1 $(PY) -m pytest $(EVERY) $(INTERPRETED)

bench: $(VENV)/.installed
	$(PY) bench/data.py
	$(PY) bench/kernels.py
	$(PY) bench/unet.py
	$(PY) bench/inception.py

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "$(PYTHON) is older than 3.10: make PYTHON=/path/to/newer"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --disable-pip-version-check $(INDEX) -c constraints.txt -e ".[test]"
	touch $@

clean:
	rm -rf $(VENV)
