# Everything here needs Python 3.11 or newer and make, nothing else. What is made lies in .venv/ and .data/.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
SOAK_SECONDS ?= 600

.PHONY: demo dev test check soak bench bench-throughput bench-peers bench-latency bench-growth bench-backlog \
	bench-isolation bench-reconciliation bench-plots env clean

demo: $(READY)  ## the main job, end to end, on real data
	$(BIN)/python -m demo

dev: $(READY)  ## the demo's world left up, with the Dagster UI on http://localhost:3000
	$(BIN)/python -m demo dev

test: $(READY)  ## every test; PYTEST_ARGS adds arguments
	$(BIN)/python -m pytest $(PYTEST_ARGS)

check: $(READY)  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

soak: $(READY)  ## writers, Dagster and failing targets for SOAK_SECONDS, killing on the way: what is lost?
	$(BIN)/python -m soak --seconds $(SOAK_SECONDS)

bench: bench-throughput bench-peers bench-latency bench-growth bench-backlog bench-isolation \
	bench-reconciliation bench-plots  ## all that follows

bench-throughput: $(READY)  ## how many records a second, at what cost?
	$(BIN)/python -m benchmarks.throughput --job

bench-isolation: $(READY)  ## do sick targets slow healthy ones down?
	$(BIN)/python -m benchmarks.isolation

bench-backlog: $(READY)  ## does a drain's memory grow with a backlog of two million changes?
	$(BIN)/python -m benchmarks.backlog

bench-growth: $(READY)  ## what do ten million settled changes cost, and what does a trigger?
	$(BIN)/python -m benchmarks.growth

bench-peers: $(READY)  ## what do others make of the same work? They are installed into .data/peers/
	$(BIN)/python -m benchmarks.peers

bench-latency: $(READY)  ## how soon is a change at the target, and what does a run cost?
	$(BIN)/python -m benchmarks.latency

bench-reconciliation: $(READY)  ## what does it cost to compare a million records with the source?
	$(BIN)/python -m benchmarks.reconciliation

# What is looked at is varied, all else is as ever; at once and with 50 ms.
SWEEP := $(BIN)/python -m benchmarks.throughput --variant rows --rounds 1 --latency 0 0.05
MEASURED := .data/benchmarks

bench-plots: $(READY)  ## throughput by requests in flight, batch size and number of targets, drawn into docs/images/
	$(SWEEP) --targets 2 --in-flight 1 2 4 8 16 32 --json $(MEASURED)/by-in-flight.json
	$(SWEEP) --targets 2 --batch 10 30 100 300 1000 --json $(MEASURED)/by-batch.json
	$(SWEEP) --targets 1 2 4 8 16 --json $(MEASURED)/by-targets.json
	$(BIN)/python -m benchmarks.plots

env: $(READY)  ## the environment alone

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "Making the environment in .venv (a minute or two, once) …"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,demo]'
	@touch $(READY)

clean:  ## stop the embedded Postgres and remove all that was made, its data too
	-@test -x $(BIN)/python && $(BIN)/python -m resources.embedded_postgres remove
	rm -rf .venv .data .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
