# Each target sets up its own virtual environment when needed. Python 3.10, 3.11 or 3.12.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXTRAS := cpu,ros,report,vlm,fleet,notebook,docs,test

# Camera-size images between processes are lost over the default transport in many containers.
export FASTDDS_BUILTIN_TRANSPORTS ?= LARGE_DATA
# A binary built for this CPU alone may not run on the next one.
export HNSWLIB_NO_NATIVE := 1
export HF_HUB_OFFLINE := 1
# Hides a notice: Material for MkDocs is maintained until May 2027; its successor reads the same mkdocs.yml.
export NO_MKDOCS_2_WARNING := true

.PHONY: demo test test-slow faults lint format docs bench clean

demo: $(STAMP)  ## Drive through a synthetic street with the real node; images in demo_output/.
	$(BIN)/semantic-anomaly demo --out demo_output

test: lint  ## Lint, types and the default tests: no GPU, no network, under ten minutes on two cores.
	$(BIN)/python -m pytest -q -m "not slow"

test-slow: $(STAMP)  ## The tests that take minutes: notebooks, demo, documentation, long runs.
	$(BIN)/python -m pytest -q -m slow

FAULTS := PYTHONPATH=test $(BIN)/python -m
FUZZ_CASES ?= 100000

faults: $(STAMP)  ## All injected faults, guards removed, parsers fuzzed, a soak; reports in faults_output/.
	$(FAULTS) faults --out faults_output
	$(FAULTS) faults.guards --out faults_output
	$(FAULTS) faults.fuzz --cases $(FUZZ_CASES) --out faults_output
	$(FAULTS) faults.lifecycle_faults --cycles 500
	$(FAULTS) faults.soak --minutes 2 --out faults_output

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy semantic_anomaly tools benchmarks

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(STAMP)  ## The documentation as a web site in site/.
	$(BIN)/mkdocs build --strict

bench: $(STAMP)  ## Where the time of a frame goes; tables and a picture in bench_output/.
	$(BIN)/python benchmarks/speed.py --out bench_output

$(STAMP): setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	touch $(VENV)/COLCON_IGNORE $@

clean:
	rm -rf $(VENV) build install log site bench_output demo_output faults_output *.egg-info .mypy_cache .pytest_cache .ruff_cache
