# Short names for real commands. Every target that needs the environment first installs it into .venv/
# (requirements/install.sh).
#
# PYTHON=python3.12   the interpreter that makes .venv
# EXTRA=gpu           install vLLM and torch for GPUs instead of CPUs; an existing .venv remembers it

PYTHON ?= python3.11
EXTRA ?= $(if $(wildcard .venv/.installed-gpu),gpu,cpu)
CHECKPOINT ?=
PORT ?= 8000
DATA ?= ../shared/data
INSTALLED := .venv/.installed-$(EXTRA)

# Ray and DeepSpeed look for `python` and `ninja` on the PATH.
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export RAY_USAGE_STATS_ENABLED ?= 0

.PHONY: help install demo test test-all test-compat test-cluster lint serve bench-training bench-scoring \
    bench-evaluation bench-rloo bench-memory bench-scaling check-scaling study-rloo study study-quick wheel image \
    has-data lock
.DEFAULT_GOAL := help

help:  ## this list
	@sed -nE 's/^([a-z-]+):.*  ## (.*)/make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 18

install: $(INSTALLED)  ## only install into .venv/ (the other targets do this themselves)

demo: $(INSTALLED)  ## the whole pipeline on the embedded world, its default; results in runs/tiny_cpu/
	python pipelines/full_rlhf.py

test: lint  ## lint, types, and every test but the slow ones
	$(call run_tests,-m "not slow",$$(grep -L '^pytestmark = .*slow' tests/component/test_*.py))

test-all: lint  ## lint, types, and every test
	$(call run_tests,,tests/component/test_*.py)

# Each component file starts its own Ray cluster, and so needs its own process (tests/component/conftest.py).
# `make test` does not even import a file that is slow as a whole. pytest exits with status 5 if all tests of a file are
# deselected.
define run_tests
python -m pytest $(1) tests/unit
for file in $(2); do python -m pytest $(1) $$file || [ $$? -eq 5 ] || exit 1; done
python -m pytest $(1) tests/e2e
endef

test-compat: $(INSTALLED) .venv-compat/.installed  ## a checkpoint in reward-bench with transformers 4.51
	python -m pytest tests/compat

test-cluster: $(INSTALLED)  ## a cluster of processes: jobs, refusals, object store, lost nodes, autoscaler (40 minutes)
	for file in cluster object_storage node_faults elastic autoscaler; do \
	    python -m pytest tests/e2e/test_$$file.py || exit 1; \
	done

lint: $(INSTALLED)  ## ruff and mypy
	ruff check .
	ruff format --check .
	mypy

serve: $(INSTALLED)  ## a reward model over HTTP: make serve CHECKPOINT=… KEYS=keys.toml [PORT=8000]
	@test -n "$(CHECKPOINT)" || { \
	    echo "make serve needs a checkpoint: make serve CHECKPOINT=runs/tiny_cpu/checkpoints/reward_model" >&2; exit 2; }
	python -m serve --checkpoint "$(CHECKPOINT)" --port $(PORT) $(if $(KEYS),--keys "$(KEYS)") \
	    $(if $(INSECURE_NO_AUTH),--insecure-no-auth)

# DATA names the folder of real preference data: make bench-training DATA=../shared/data
bench-training: has-data .venv/.installed-bench  ## training throughput against TRL, 15 minutes [DATA=…]
	python -m research.bench.training --data "$(DATA)"

bench-scoring: has-data .venv/.installed-bench  ## scores over HTTP against OpenRLHF and vLLM, 15 minutes [DATA=…]
	python -m research.bench.scoring --data "$(DATA)"

bench-evaluation: has-data $(INSTALLED)  ## an evaluation's scores against one forward per response, 10 minutes [DATA=…]
	python -m research.bench.evaluation --data "$(DATA)"

bench-rloo: .venv/.installed-bench  ## RLOO steps against TRL, overlap, engines, weight updates; 15 minutes
	python -m research.bench.rloo

bench-memory: $(INSTALLED)  ## peak memory of training against the longest completion in the data
	python -m research.bench.memory

bench-scaling: $(INSTALLED)  ## rates and runs for docs/results/scaling.md: 10 minutes on an otherwise idle machine
	python -m research.bench.scaling

check-scaling: $(INSTALLED)  ## docs/results/scaling.md's formulas against the runs; fails beyond a factor of two
	python -m research.scaling --check

study-rloo: $(INSTALLED)  ## RLOO with and without lag, and against an over-optimised reward model: an hour on 2 cores
	python -m research.bench.rloo_study

study: $(INSTALLED)  ## the paper's claims: do the missing runs (hours), write docs/results/study.md [DATA=…]
	python -m research.study --data "$(DATA)"

study-quick: $(INSTALLED)  ## a small study on the embedded world (20 minutes); writes only to runs/study_quick/
	python -m research.study --quick --worlds embedded

# pip leaves build/ behind, and setuptools would put what is still there into the next wheel.
wheel:  ## the wheel, dist/rm_robust-*.whl: alone it is the light scoring client, with [cpu] or [gpu] everything
	rm -rf build
	$(PYTHON) -m pip wheel --quiet --no-deps --wheel-dir dist .
	rm -rf build

image:  ## the container image of deploy/Dockerfile.cpu (of Dockerfile.gpu with EXTRA=gpu)
	docker build --file deploy/Dockerfile.$(EXTRA) --tag rm-robust:$(EXTRA) .

has-data:
	@test -f "$(DATA)/human_pairs.parquet" || { \
	    echo "There is no human_pairs.parquet in '$(DATA)': name the folder of real preference data, DATA=…" >&2; exit 2; }

lock:  ## resolve requirements/cpu.lock and gpu.lock again
	@PYTHON="$(PYTHON)" requirements/install.sh lock

$(INSTALLED): pyproject.toml requirements/$(EXTRA).lock requirements/install.sh
	@PYTHON="$(PYTHON)" requirements/install.sh $(EXTRA)

# The lock is a constraint here: the peers' other dependencies are in it, and keep their versions.
.venv/.installed-bench: $(INSTALLED)
	@requirements/install.sh bench

.venv-compat/.installed: requirements/compat.lock requirements/install.sh
	@PYTHON="$(PYTHON)" requirements/install.sh compat
