# A newcomer's commands: `make train`, `make full` and `make test`. Each first brings .venv up to date, which takes a
# moment and prints nothing when there is nothing to install.
#
#   PYTHON=python3.12   which Python makes .venv (3.11 or newer; the first suitable one by default)
#   DEVICE=cpu|cuda     which build to install (by default, what the machine has)
#   EXTRAS=llm,dev      optional dependencies of pyproject.toml (default: llm,dev,kafka)
#   USERS=3000 SEED=1  size and seed of the world of `make full`
#   RANKS=2             processes of each of its steps
#   LIMELIGHT_TORCH_INDEX=https://download.pytorch.org/whl/cpu
#                       a further index for torch: this one has the small CPU wheel, PyPI's brings CUDA along

DEVICE = auto
EXTRAS = llm,dev,kafka
WORLD = data/simulated
# Of `make full`; the days are those of its job files.
USERS = 3000
SEED = 1
RANKS = 2
# The version that torch's CUDA build brings along.
TRITON = 3.7.1

ifndef PYTHON
PYTHON := $(shell for python in python3.11 python3.12 python3.13 python3.14; do \
	  $$python -c '' 2>/dev/null && echo $$python && exit; done; echo python3)
endif

.PHONY: setup train full test test-all test-kafka test-triton test-gpu bench chaos lint format doctor clean

setup:
	@command -v $(PYTHON) >/dev/null || { echo "limelight: error: no $(PYTHON) here; install Python 3.11 or newer, or name one: make PYTHON=..." >&2; exit 2; }
	@$(PYTHON) -m launch.setup --device $(DEVICE) --extras $(EXTRAS)

train: setup
	@test -e $(WORLD)/dataset.json || .venv/bin/limelight data simulate $(WORLD) --users 3000 --days 10 --partitions 8 --seed 1
	@.venv/bin/limelight train configs/simulated.toml --ranks 2

# All systems in one ranker, from nothing to its table of metrics (configs/full.toml). Each step leaves its result whole or
# not at all, and is skipped if the result is there, so the same command continues after any end, with any RANKS.
full: setup
	@mkdir -p data/full && test -e data/full/size || echo "USERS=$(USERS) SEED=$(SEED)" >data/full/size
	@test "$$(cat data/full/size)" = "USERS=$(USERS) SEED=$(SEED)" || { echo "limelight: error: data/full was begun with $$(cat data/full/size); name them, or remove data/full and runs/full" >&2; exit 2; }
	$(call step,1,simulate users and rooms,data/full/world/dataset.json,$(full-world))
	$(call step,2,align authors with users,runs/full/align/metrics.json,$(full-align))
	$(call step,3,fit a codebook of aligned vectors,data/full/codebooks/aligned/codebook.json,$(full-aligned))
	$(call step,4,give the segments codes of aligned vectors,data/full/codes-aligned.parquet,$(full-codes-aligned))
	$(call step,5,fit a codebook of what rooms show,data/full/codebooks/shown/codebook.json,$(full-shown))
	$(call step,6,give the segments codes of what they show,data/full/codes-shown.parquet,$(full-codes-shown))
	$(call step,7,train the predictor of the next code,runs/full/foresight/metrics.json,$(full-foresight))
	$(call step,8,forecast and train in the order of time,runs/full/follow/metrics.json,$(full-follow))
	@echo "full 9/9: train the ranker on the stream"
	@.venv/bin/limelight train configs/full.toml --ranks $(RANKS)

# Number, description and result of a step, and the arguments of `limelight` that make the result.
step = @if test -e $(3); then echo "full $(1)/9: $(2): done, $(3) is there"; else echo "full $(1)/9: $(2)"; .venv/bin/limelight $(4); fi
full-world = data simulate data/full/world --users $(USERS) --days 9 --partitions 8 --seed $(SEED) --segment-vectors \
  --segment-taste 0.8 --lookahead
full-align = align configs/align.toml --ranks $(RANKS) run.directory=runs/full/align data.path=data/full/world \
  data.train_until=2024-03-07 data.eval_from=2024-03-07 data.eval_until=2024-03-08
full-aligned = quantize configs/quantize.toml --ranks $(RANKS) codebook.directory=data/full/codebooks/aligned \
  data.path=data/full/world data.vectors=runs/full/align/authors data.fit_until=2024-03-07 \
  codebook.levels=[64,64,64] codebook.iterations=10
full-codes-aligned = quantize assign data/full/codebooks/aligned data/full/world data/full/codes-aligned.parquet \
  --vectors runs/full/align/authors
full-shown = quantize configs/quantize.toml --ranks $(RANKS) codebook.directory=data/full/codebooks/shown \
  data.path=data/full/world data.fit_until=2024-03-07 codebook.levels=[256] codebook.iterations=10
full-codes-shown = quantize assign data/full/codebooks/shown data/full/world data/full/codes-shown.parquet
full-codes = data.path=data/full/world data.codes=data/full/codes-shown.parquet data.codebook=data/full/codebooks/shown \
  data.runs=32
full-foresight = foresight configs/foresight.toml --ranks $(RANKS) run.directory=runs/full/foresight $(full-codes) \
  data.train_until=2024-03-07 data.eval_until=2024-03-08 train.epochs=2
full-follow = foresight follow configs/foresight.toml --ranks $(RANKS) run.directory=runs/full/follow $(full-codes) \
  follow.init_from=runs/full/foresight

# Hundreds of processes import the project: with the compiled files that an environment may forbid, each compiles nothing.
test test-all: export PYTHONDONTWRITEBYTECODE =

test: setup
	@.venv/bin/python -m pytest -n auto --maxprocesses 8 --dist loadscope --no-loadscope-reorder

test-all: setup
	@.venv/bin/python -m pytest -n auto --maxprocesses 8 --dist loadscope --no-loadscope-reorder --slow

# The tests of Kafka sources on real brokers; without these they run on a cluster that librdkafka brings along.
test-kafka: setup
	@test -n "$(BROKERS)" || { echo "limelight: error: name the brokers: make test-kafka BROKERS=host:9092" >&2; exit 2; }
	@LIMELIGHT_KAFKA_BROKERS=$(BROKERS) .venv/bin/python -m pytest $(addprefix tests/stream/sources/test_kafka_,$(addsuffix .py,source dead_letters offsets brokers publish))

# The search and the dynamic ids of a GPU, without one: in Triton's interpreter, and compiled ahead of time. About 700 MB
# go to build/, where no other command finds them, since libraries behave otherwise once they can import Triton.
test-triton: setup build/triton-$(TRITON)
	@PYTHONPATH=build/triton-$(TRITON) TRITON_INTERPRET=1 .venv/bin/python -m pytest tests/modules/search/test_triton_kernel.py tests/ranking/test_device_histories.py tests/ranking/test_growing_device_histories.py tests/sparse/test_device_ids.py -k "not takes_the_same_steps"

build/triton-$(TRITON):
	@mkdir -p build && rm -rf $@.partial
	@.venv/bin/python -m pip install --quiet --no-deps --target $@.partial triton==$(TRITON)
	@mv $@.partial $@

# All that only a GPU can show, in ten minutes on one card, where pyproject.toml's packages are installed already: set-up
# would replace a machine's own torch.
test-gpu:
	@test -x .venv/bin/python && python=.venv/bin/python || python=$(PYTHON); $$python -m benchmarks.speed.gpu --out benchmarks/results/gpu.json

# The short set, under ten minutes on two cores: tables, and a JSON file for each in build/benchmarks.
bench: setup
	@.venv/bin/limelight bench --json build/benchmarks

# About ten minutes on two cores; SEED=2 draws other faults, FAULTS=20 fewer.
chaos: setup
	@.venv/bin/python -m tests.faults.chaos --faults $(or $(FAULTS),100) --seed $(or $(SEED),1)

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports --no-logo

format: setup
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

doctor: setup
	@.venv/bin/limelight doctor

# Everything that the commands above made, but data/ and runs/.
clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
