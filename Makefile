# Everything runs in environments that this file makes: $(VENV) for visbi, one under .venvs/ for each peer.
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
PEERS := $(patsubst benchmarks/peers/%.txt,%,$(wildcard benchmarks/peers/*.txt))

BIN := $(VENV)/bin
PIP_INSTALL = install --quiet --disable-pip-version-check -c constraints.txt
CORE := $(VENV)/.core-installed
DEV := $(VENV)/.dev-installed
DOCS := $(VENV)/.docs-installed
# One thread for each test worker unless the user says otherwise.
PYTEST = OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest
# Measured in one thread, scores included: scikit-learn's trees would take every core beside other work.
BENCH = OMP_NUM_THREADS=1 $(BIN)/python

.DEFAULT_GOAL := help
.PHONY: help demo test test-doc test-slow test-peers contract-table test-lowest lint format types docs bench step-time lynx-hare contract-c2st auto-fit auto-fit-peers neural-potentials floors many amortized rounds sbibm reference peers dev clean

help: ## this list
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /: /'

demo: $(CORE) ## lynx and hare from simulator to certified posterior, into demo-output/
	$(BIN)/visbi demo --output demo-output

test: test-doc ## docstring examples, then the tests that are not slow
	$(PYTEST) -n $(JOBS)

test-doc: $(DEV) ## docstring examples only
	$(PYTEST) --doctest-modules src/visbi -n $(JOBS)

test-slow: $(DEV) ## accuracy tests that take minutes; having none (pytest's exit code 5) is no failure
	$(PYTEST) -m slow -n $(JOBS) || test $$? -eq 5

test-peers: .venvs/sbi/.installed ## tests with sbi's own objects, in sbi's environment
	.venvs/sbi/bin/python -m pip $(PIP_INSTALL) -e . pytest
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} .venvs/sbi/bin/python -m pytest -m peers tests/peers

contract-table: $(DEV) .venvs/sbi/.installed ## run the tests that hold the contract, into docs/contract.md
	.venvs/sbi/bin/python -m pip $(PIP_INSTALL) -e '.[dev]'
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python tests/write_contract_table.py --peers-python .venvs/sbi/bin/python

test-lowest: .venvs/lowest/.installed ## the tests on the oldest dependencies that pyproject.toml allows
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} .venvs/lowest/bin/python -m pytest -n $(JOBS)

lint: $(DEV) ## ruff and the import contract
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

format: $(DEV) ## let ruff repair what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(DEV) ## pyright
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(DOCS) ## the manual, into site/
	$(BIN)/mkdocs build --strict

bench: step-time lynx-hare contract-c2st auto-fit auto-fit-peers neural-potentials floors many amortized rounds sbibm ## every benchmark that ends in a table

step-time: $(CORE) .venvs/sbi/.installed ## milliseconds per gradient step beside sbi
	$(BENCH) benchmarks/step_time.py --visbi-python $(BIN)/python --sbi-python .venvs/sbi/bin/python

lynx-hare: $(CORE) ## the lynx-hare posterior by visbi beside long NUTS
	$(BENCH) benchmarks/lynx_hare.py

contract-c2st: $(CORE) ## C2ST of the defaults on the linear Gaussian, every family and objective
	$(BENCH) benchmarks/contract_c2st.py

auto-fit: $(CORE) .venvs/sbi/.installed ## q="auto" and sbi on targets with exact draws, ten seeds or three; resumes
	$(BENCH) benchmarks/auto_fit.py --visbi-python $(BIN)/python --sbi-python .venvs/sbi/bin/python
	$(BENCH) benchmarks/auto_fit.py --visbi-python $(BIN)/python --tools visbi --groups hard

auto-fit-peers: $(CORE) .venvs/sbi/.installed .venvs/numpyro/.installed .venvs/blackjax/.installed ## every other peer there, three seeds; hours, resumes
	$(BENCH) benchmarks/auto_fit.py --sbi-python .venvs/sbi/bin/python --numpyro-python .venvs/numpyro/bin/python \
	  --blackjax-python .venvs/blackjax/bin/python --tools sbi-maf-fKL sbi-nsf-rKL numpyro-nuts blackjax-pathfinder blackjax-smc

neural-potentials: $(CORE) .venvs/sbi/.installed ## q="auto" and sbi on learned likelihoods and ratios; resumes
	$(BENCH) benchmarks/neural_potentials.py --visbi-python $(BIN)/python --sbi-python .venvs/sbi/bin/python

floors: $(CORE) ## what the automatic fit's stages cost beside the least that they could
	$(BENCH) benchmarks/floors.py

many: $(DEV) .venvs/sbi/.installed ## fit_many beside loops of single fits, and calibration of a thousand fits
	$(BENCH) benchmarks/many.py --sbi-python .venvs/sbi/bin/python

amortized: $(DEV) .venvs/sbi/.installed ## q(theta | x) from 10,000 simulations, raw and corrected; resumes
	$(BENCH) benchmarks/amortized.py --sbi-python .venvs/sbi/bin/python

rounds: $(DEV) .venvs/sbi/.installed ## infer beside published numbers of SNLE and SNPE, and beside sbi's SNLE; resumes
	$(BENCH) benchmarks/rounds.py --sbi-python .venvs/sbi/bin/python

sbibm: $(DEV) .venvs/sbibm/.installed ## q="auto" beside the reference draws that the SBI benchmark carries
	$(BENCH) benchmarks/sbibm_draws.py

reference: .venvs/numpyro/.installed ## the lynx-hare posterior by long NUTS, into benchmarks/data/
	.venvs/numpyro/bin/python benchmarks/reference_lynx_hare.py

peers: $(PEERS:%=.venvs/%/.installed) ## an environment for each peer

dev: $(DEV) ## visbi with all that developers need

clean: ## remove environments and outputs
	rm -rf .venv .venvs .venv-ci build dist site demo-output htmlcov .coverage .pytest_cache .ruff_cache .import_linter_cache

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(CORE): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip $(PIP_INSTALL) -e .
	@touch $@

$(DEV): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip $(PIP_INSTALL) -e '.[dev,export]'
	@touch $@ $(CORE)

$(DOCS): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip $(PIP_INSTALL) -e '.[docs]'
	@touch $@

.venvs/lowest/.installed: pyproject.toml constraints-lowest.txt
	test -x .venvs/lowest/bin/python || $(PYTHON) -m venv .venvs/lowest
	.venvs/lowest/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-lowest.txt -e . pytest pytest-xdist hypothesis
	@touch $@

.venvs/sbibm/.installed: benchmarks/peers/sbibm.txt
	test -x .venvs/sbibm/bin/python || $(PYTHON) -m venv .venvs/sbibm
	.venvs/sbibm/bin/python -m pip $(PIP_INSTALL) --no-deps -r $<
	@touch $@

.venvs/%/.installed: benchmarks/peers/%.txt constraints.txt
	test -x .venvs/$*/bin/python || $(PYTHON) -m venv .venvs/$*
	.venvs/$*/bin/python -m pip $(PIP_INSTALL) -r $<
	@touch $@
