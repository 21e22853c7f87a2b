# linattn: `make demo` and `make test` are all a newcomer needs; both set up .venv by themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Files share what they compile, so that each is one worker's. In their own order: by number of tests the longest few
# would come last, and one worker would wait for the other.
BY_FILE := --dist loadfile --no-loadscope-reorder

.PHONY: help demo test test-quick test-sweep fuzz aarch64 bench-readme dist docs from-nothing lint format type clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "linattn needs Python 3.11 or newer, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[compile,bench,test,dev]'
	@touch $@

demo: $(STAMP)  ## build the sample model, compile it for the CPU and generate with it
	$(BIN)/python samples/tiny_hybrid.py build/tiny/model.onnx
	$(BIN)/linattn-compile build/tiny/model.onnx --target cpu --max-context 256 --prefill-blocks 64,8 -o build/tiny/model.vmfb
	$(BIN)/linattn-run build/tiny/model.vmfb --prompt Hello --max-tokens 24

test: $(STAMP)  ## every test; the Vulkan ones need a driver (Debian: apt-get install mesa-vulkan-drivers libvulkan1)
	$(BIN)/python -m pytest -q -n 2 $(BY_FILE)

test-quick: $(STAMP)  ## two minutes: the parts, the code they emit, the pages, one whole model on the CPU
	$(BIN)/python -m pytest -q -n 2 $(BY_FILE) -m 'not vulkan and not slow' tests/unit tests/ir tests/docs tests/e2e/test_tiny_hybrid.py

test-sweep: $(STAMP)  ## LinearAttention at every head size on every width of vectors: half an hour
	LINATTN_SWEEP=1 $(BIN)/python -m pytest -q -n 2 tests/numeric/test_every_head_size.py

fuzz: $(STAMP)  ## ten minutes of each fuzzer (damaged models, manifests, files; random calls)
	$(BIN)/python -m pytest -q -s tests/fuzz --fuzz-seconds 600

aarch64: $(STAMP)  ## an AArch64 Python in build/ for the test that emulates one (needs Debian and its package qemu-user)
	PYTHON=$(BIN)/python tests/aarch64_root.sh build/aarch64

bench-readme: $(STAMP)  ## the benchmark models on this machine's CPU and GPUs, and the tables of README and docs: half an hour, idle
	$(BIN)/python docs/speeds.py --measure build/bench
	$(BIN)/python docs/small_tables.py

dist: $(STAMP)  ## wheel and sdist in dist/, the wheel tried in a new environment of each Python there is (PYTHONS="python3")
	rm -rf dist
	$(BIN)/python -m build --outdir dist . >/dev/null
	tests/smoke_dist.sh dist build/dist $(PYTHONS)

docs: $(VENV)/.docs $(VENV)/types/linattn  ## the documentation as pages in build/site; a broken link or a page left out is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

from-nothing: $(STAMP)  ## the commands of README, tutorial and how-tos, as they stand there, each in a new container
	$(BIN)/python tests/docs/from_nothing.py

$(VENV)/.docs: $(STAMP) pyproject.toml
	$(BIN)/python -m pip install --quiet -e '.[docs]'
	@touch $@

lint: $(STAMP)  ## ruff: style, imports, docstrings, formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)  ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

type: $(STAMP) $(VENV)/types/linattn  ## pyright, strict on the three packages
	$(BIN)/pyright --pythonpath $(BIN)/python

$(VENV)/types/linattn: $(STAMP)
	@mkdir -p $@
	@for p in frontend dialect_patterns runtime; do ln -sfn ../../../$$p $@/$$p; done
	@ln -sfn ../../../runtime/package/install.py $@/install.py

clean:  ## remove what the commands above made
	rm -rf $(VENV) build
