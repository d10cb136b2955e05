# Two commands: `make demo` trains and samples, `make test` proves. Both make their own .venv first.
# On a machine without a GPU, TORCH_INDEX saves a download of several GB:
#     make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu

PYTHON ?= python3
VENV ?= .venv
PY = $(VENV)/bin/python
INDEX = $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.PHONY: demo test bench clean

demo: $(VENV)/.installed
	$(PY) ldm_cfg.py

test: $(VENV)/.installed
	$(PY) -m ruff check .
	$(PY) -m pytest

bench: $(VENV)/.installed
	$(PY) bench/data.py

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "$(PYTHON) is older than 3.10: make PYTHON=/path/to/newer"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --disable-pip-version-check $(INDEX) -e ".[test]"
	touch $@

clean:
	rm -rf $(VENV)
