# Everything sets up its own virtual environment when needed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Camera-size images between processes are lost over the default transport in many containers.
export FASTDDS_BUILTIN_TRANSPORTS ?= LARGE_DATA
# A binary built for this CPU alone may not run on the next one.
export HNSWLIB_NO_NATIVE := 1
export HF_HUB_OFFLINE := 1

.PHONY: demo test lint format bench ablation clean

demo: $(STAMP)  ## Drive through a synthetic street with the real node; pictures in demo_output/.
	$(BIN)/semantic-anomaly demo --out demo_output

test: lint  ## Lint, types and every test that needs no GPU and no network.
	$(BIN)/python -m pytest -q -m "not slow"

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy semantic_anomaly tools benchmarks

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP)  ## Stage times and the search, side by side.
	$(BIN)/python benchmarks/stages.py
	$(BIN)/python benchmarks/search.py

ablation: $(STAMP)  ## What each part of the method earns on held-out streets; two hours.
	$(BIN)/python benchmarks/ablation.py --times

$(STAMP): setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[ros,report,vlm,test]'
	touch $(VENV)/COLCON_IGNORE $@

clean:
	rm -rf $(VENV) build install log demo_output *.egg-info .mypy_cache .pytest_cache .ruff_cache
