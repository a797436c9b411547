# Everything runs in .venv, which is made at the first use. CI calls `make ci`; nothing in it that you could not call.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-vllm vllm-env llamacpp bench-vllm check format docs bench ci clean models servers

demo: $(STAMP)  ## four agents, four ways to hand over, on the default model
	$(BIN)/avp demo --fixed-length

test: $(STAMP) models llamacpp  ## the whole test suite; vLLM's part if its environment is there
	AVP_VLLM_PYTHON=$$(tools/vllm_env.sh --check) $(BIN)/pytest --cov=avp --cov-branch --cov-report=term:skip-covered --cov-fail-under=94

llamacpp: $(STAMP)  ## llama-cpp-python, built once into the user's cache; where it cannot be built, its tests are skipped
	-$(BIN)/python tools/llamacpp_wheel.py

test-vllm: $(STAMP) models vllm-env  ## vLLM's part alone
	AVP_VLLM_PYTHON=$$(tools/vllm_env.sh --check) $(BIN)/pytest -q tests/vllm

vllm-env:  ## vLLM's environment, in the user's cache; where it cannot be built, one line says why
	-tools/vllm_env.sh

bench-vllm: $(STAMP) models vllm-env  ## the plug-in's figures
	$(BIN)/python tests/vllm/measure.py --python $$(tools/vllm_env.sh --check)

check: $(STAMP)  ## format, lint, types, layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -q tests/test_layers.py

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(STAMP)  ## the site, into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: $(STAMP) models  ## the figures under docs/bench, with the peer in an environment of its own
	$(BIN)/avp bench perf --out docs/bench
	$(BIN)/avp bench net --out docs/bench
	$(BIN)/avp bench chain --data ../shared/data/gsm8k.jsonl --limit 3 --agents 4 --out docs/bench
	$(BIN)/avp bench chain --data ../shared/data/gsm8k.jsonl --limit 1 --agents 16 --name chain-16 --out docs/bench
	$(BIN)/avp bench latent --limit 100 --out docs/bench
	$(BIN)/avp bench llamacpp --out docs/bench
	$(BIN)/avp bench engines --data ../shared/data/wikitext2_test.txt --out docs/bench
	$(BIN)/python docs/make_benchmarks.py

servers:  ## a Redis for the tests, where the system's packages may be installed
	@command -v redis-server >/dev/null || (apt-get update -qq && apt-get install -y -qq redis-server >/dev/null) \
	  || echo "no redis-server: the tests of the Redis store will be skipped"

models: $(STAMP)  ## the two small models, into the user's cache
	$(BIN)/avp models get smollm2
	$(BIN)/avp models get gemma3

ci: check servers vllm-env test docs
	@echo "ci: done; left out: make bench (timings, and the peer's environment)"

$(STAMP): pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) site .pytest_cache .mypy_cache .ruff_cache
