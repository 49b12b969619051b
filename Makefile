# Quickstep from nothing: a Python >= 3.10 with venv, and make. Everything is installed under $QUICKSTEP_CACHE
# (default ~/.cache/quickstep); COMFYUI_PATH uses a ComfyUI of your own instead of the pinned one.

PYTHON ?= python3
BED = $(PYTHON) demo/testbed.py
PORT ?= 8188

.PHONY: demo serve test test-matrix lint bench bench-orders bench-overhead bench-demo bench-solvers bench-defects bench-accelerators bench-calibrated docs workflows train-demo clean

demo:         ## pictures and the comparison table, into output/
	@$(BED) run python -m demo.run $(ARGS)

serve:        ## the real interface on http://127.0.0.1:8188 (PORT=...), with the pack and its demo model
	@$(BED) run python -m demo.server $(PORT)

test:         ## all tests, on two cores; ARGS="tests/test_exponential.py -k order" for some
	@$(BED) --tests run pytest $(or $(ARGS),-n 2 --dist loadgroup)

test-matrix:  ## the smoke tests on every supported ComfyUI
	@$(BED) matrix

lint:         ## ruff and pyright
	@$(BED) --tests run ruff check .
	@$(BED) --tests run ruff format --check .
	@$(BED) --tests run pyright

bench:        ## measurements, into benchmarks/results/
	@$(BED) --tests run python benchmarks/run.py $(ARGS)

bench-orders bench-overhead bench-demo bench-solvers bench-defects bench-accelerators bench-calibrated:  ## one; solvers, accelerators, calibrated take hours, --quick less
	@$(BED) --tests run python benchmarks/$(subst demo,demo_table,$(subst bench-,,$@)).py $(ARGS)

docs:         ## help pages and the README's tables, from the docstrings
	@$(BED) --tests run python demo/make_docs.py

workflows:    ## workflows/*.json with their thumbnails, through the real frontend
	@$(BED) --tests run python -m demo.workflows $(ARGS)

train-demo:   ## the demo model again, resuming what is in demo/checkpoints (hours on a CPU)
	@$(BED) run python demo/train.py $(or $(ARGS),all)

clean:        ## what this checkout made; the cache stays
	rm -rf output
