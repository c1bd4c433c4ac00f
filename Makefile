# A newcomer's two commands: `make train` and `make test`. Each first brings .venv up to date, which takes a moment and
# prints nothing when there is nothing to install.
#
#   PYTHON=python3.12   which Python makes .venv (3.11 or newer; the first suitable one by default)
#   DEVICE=cpu|cuda     which build to install (by default, what the machine has)
#   EXTRAS=llm,dev      optional dependencies of pyproject.toml (default: llm,dev,kafka)
#   LIMELIGHT_TORCH_INDEX=https://download.pytorch.org/whl/cpu
#                       a further index for torch: this one has the small CPU wheel, PyPI's brings CUDA along

DEVICE = auto
EXTRAS = llm,dev,kafka
WORLD = data/simulated
# The version that torch's CUDA build brings along.
TRITON = 3.7.1

ifndef PYTHON
PYTHON := $(shell for python in python3.11 python3.12 python3.13 python3.14; do \
	  $$python -c '' 2>/dev/null && echo $$python && exit; done; echo python3)
endif

.PHONY: setup train test test-all test-kafka test-triton test-gpu chaos lint format doctor clean

setup:
	@command -v $(PYTHON) >/dev/null || { echo "limelight: error: no $(PYTHON) here; install Python 3.11 or newer, or name one: make PYTHON=..." >&2; exit 2; }
	@$(PYTHON) -m launch.setup --device $(DEVICE) --extras $(EXTRAS)

train: setup
	@test -e $(WORLD)/dataset.json || .venv/bin/limelight data simulate $(WORLD) --users 3000 --days 10 --partitions 8 --seed 1
	@.venv/bin/limelight train configs/simulated.toml --ranks 2

test: setup
	@.venv/bin/python -m pytest -n auto --maxprocesses 8 --dist loadscope --no-loadscope-reorder

test-all: setup
	@.venv/bin/python -m pytest -n auto --maxprocesses 8 --dist loadscope --no-loadscope-reorder --slow

# The tests of Kafka sources on real brokers; without these they run on a cluster that librdkafka brings along.
test-kafka: setup
	@test -n "$(BROKERS)" || { echo "limelight: error: name the brokers: make test-kafka BROKERS=host:9092" >&2; exit 2; }
	@LIMELIGHT_KAFKA_BROKERS=$(BROKERS) .venv/bin/python -m pytest $(addprefix tests/stream/sources/test_kafka_,$(addsuffix .py,source dead_letters offsets brokers publish))

# The GPU search without a GPU: in Triton's interpreter, and compiled ahead of time. About 700 MB go to build/, where no
# other command finds them, since libraries behave otherwise once they can import Triton.
test-triton: setup build/triton-$(TRITON)
	@PYTHONPATH=build/triton-$(TRITON) TRITON_INTERPRET=1 .venv/bin/python -m pytest tests/modules/search/test_triton_kernel.py

build/triton-$(TRITON):
	@mkdir -p build && rm -rf $@.partial
	@.venv/bin/python -m pip install --quiet --no-deps --target $@.partial triton==$(TRITON)
	@mv $@.partial $@

# All that only a GPU can show, in ten minutes on one card, where pyproject.toml's packages are installed already: set-up
# would replace a machine's own torch.
test-gpu:
	@test -x .venv/bin/python && python=.venv/bin/python || python=$(PYTHON); $$python -m benchmarks.speed.gpu --out benchmarks/results/gpu.json

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
