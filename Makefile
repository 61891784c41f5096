# Two commands do everything on a machine with only Python ≥ 3.11 and make: `make quickstart` and `make test`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# One thread a test process: the suite runs two of them.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.PHONY: install quickstart test test-all test-device test-network check format clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

quickstart: install
	$(BIN)/megalith quickstart

test: install
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not device"

test-all: install
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist loadfile -m "not device"

# Ten thousand mutations of checkpoint files from elsewhere, read and converted; `make test` does 300.
fuzz: install
	MEGALITH_FUZZ=10000 $(TEST_ENV) $(BIN)/python -m pytest -s tests/faults/test_damaged_pickles.py tests/faults/test_conversion_faults.py -k "mutations or mutated"

test-device: install
	$(BIN)/python -m pytest tests/device -m device

# Two machines, made of network namespaces: needs Linux and root. One of these tests runs in `make test`, too.
test-network: install
	$(TEST_ENV) $(BIN)/python -m pytest tests/network

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
