# `make demo` and `make test` need Python 3.11 with venv and pip; each sets up its own virtual environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Where it is set, each of the processes that tests start compiles this project's modules anew: two seconds of one core.
export PYTHONDONTWRITEBYTECODE :=
STAMP := $(VENV)/.installed

.PHONY: demo demo-real test test-fast test-unit test-integration test-flows lint zoo lock clean

demo: $(STAMP)  ## the main job on a miniature pair: migrate, fine-tune, compare, report
	@rm -rf demo-output
	$(BIN)/lorasuite demo --output demo-output

# Hub ids, or directories given: make demo-real OLD=DIR NEW=DIR TRAIN=rows.jsonl TEST=rows.jsonl
OLD ?= HuggingFaceTB/SmolLM2-135M-Instruct
NEW ?= google/gemma-3-270m
TASK ?= task
demo-real: $(STAMP)  ## really pretrained bases and your rows: an adapter trained, moved, and set against a fresh LoRA (an hour)
	@test -n "$(TRAIN)" -a -n "$(TEST)" || { echo "make demo-real TRAIN=rows.jsonl TEST=rows.jsonl [OLD=… NEW=… TASK=…]"; exit 2; }
	$(BIN)/python -m benchmarks.real run --grid demo --old-base $(OLD) --new-base $(NEW) --task $(TASK) \
	  --train $(TRAIN) --test $(TEST) --work demo-output-real --cells demo-output-real/cells
	$(BIN)/python -m benchmarks.real tables --cells demo-output-real/cells --page demo-output-real/results.md
	@cat demo-output-real/results.md

# A file at a time: what its tests share (servers, models) is made once. Three processes on two cores: the first half,
# flows, waits for servers and clocks. The longest files first.
PYTEST := $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

test: $(STAMP) lint  ## every test
	$(PYTEST) tests/flows tests/integration tests/unit

test-flows: $(STAMP)  ## whole runs: migrations, fleets, experiments, hosts, crashes
	$(PYTEST) tests/flows

test-integration: $(STAMP)  ## libraries and models together: fine-tunes, evaluations, bad input
	$(PYTEST) tests/integration

test-unit: $(STAMP)  ## one room at a time
	$(PYTEST) tests/unit

# For the loop of a person who changes one room, under a minute: make test-fast ROOM=bases
ROOM ?=
test-fast: $(STAMP) lint  ## lint, and the quick unit tests of a room, or of all
	$(PYTEST) -m "not slow" tests/unit/$(ROOM)

# Sizes by flags: make soak SOAK="--processes 4 --adapters 2 --pairs 1"
SOAK ?=
soak: $(STAMP)  ## writes that fail, kills in every stage, many processes at once: about an hour
	$(BIN)/python -m tests.soak $(SOAK)

lint: $(STAMP)  ## style, types, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

zoo: $(STAMP)  ## train the miniature models again (about half an hour)
	$(BIN)/python -m benchmarks.zoo.train

lock: $(STAMP)  ## write what is installed into constraints.txt
	{ echo "# What the tests were run with. Regenerate with: make lock"; \
	  $(BIN)/pip freeze --exclude-editable | sed 's/+cpu//'; } > constraints.txt

clean:
	rm -rf $(VENV) demo-output build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt "torch==2.13.0"
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@
