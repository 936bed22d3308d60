# Thin names for real commands. Every target that needs the environment installs it into .venv/ first (requirements/install.sh).
#
# PYTHON=python3.12   the interpreter that .venv is made with
# EXTRA=gpu           vLLM and torch for GPUs instead of CPUs; remembered by the .venv that was made with it

PYTHON ?= python3.11
EXTRA ?= $(if $(wildcard .venv/.installed-gpu),gpu,cpu)
CHECKPOINT ?=
PORT ?= 8000
DATA ?= ../shared/data
INSTALLED := .venv/.installed-$(EXTRA)

# Ray and DeepSpeed look for `python` and `ninja` on the PATH.
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export RAY_USAGE_STATS_ENABLED ?= 0

.PHONY: help install demo test test-all test-compat test-cluster lint serve bench-training bench-scoring bench-evaluation bench-rloo bench-memory bench-scaling check-scaling study-rloo study study-quick has-data lock
.DEFAULT_GOAL := help

help:  ## this list
	@sed -nE 's/^([a-z-]+):.*  ## (.*)/make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 18

install: $(INSTALLED)  ## only install into .venv/ (the other targets do it by themselves)

demo: $(INSTALLED)  ## the whole pipeline on its embedded default; results in runs/tiny_cpu/
	python pipelines/full_rlhf.py

test: lint  ## lint, types, and every test but the slow ones
	$(call run_tests,-m "not slow",$$(grep -L '^pytestmark = .*slow' tests/component/test_*.py))

test-all: lint  ## lint, types, and every test
	$(call run_tests,,tests/component/test_*.py)

# Each component file starts a Ray cluster of its own and needs a process of its own (tests/component/conftest.py). One that is slow as a whole is not even
# imported for `make test`. Status 5: all were deselected.
define run_tests
python -m pytest $(1) tests/unit
for file in $(2); do python -m pytest $(1) $$file || [ $$? -eq 5 ] || exit 1; done
python -m pytest $(1) tests/e2e
endef

test-compat: $(INSTALLED) .venv-compat/.installed  ## a checkpoint in reward-bench and transformers 4.51, in an environment of their own
	python -m pytest tests/compat

test-cluster: $(INSTALLED)  ## a head and workers as processes on this machine: jobs, refusals, an object store, lost nodes, the autoscaler (40 minutes)
	for file in cluster object_storage node_faults elastic autoscaler; do python -m pytest tests/e2e/test_$$file.py || exit 1; done

lint: $(INSTALLED)  ## ruff and mypy
	ruff check .
	ruff format --check .
	mypy

serve: $(INSTALLED)  ## a reward model over HTTP: make serve CHECKPOINT=runs/tiny_cpu/checkpoints/reward_model KEYS=keys.toml [PORT=8000]
	@test -n "$(CHECKPOINT)" || { echo "make serve needs a checkpoint: make serve CHECKPOINT=runs/tiny_cpu/checkpoints/reward_model" >&2; exit 2; }
	python -m serve --checkpoint "$(CHECKPOINT)" --port $(PORT) $(if $(KEYS),--keys "$(KEYS)") $(if $(INSECURE_NO_AUTH),--insecure-no-auth)

bench-training: has-data .venv/.installed-bench  ## training throughput against TRL, within 15 minutes: make bench-training [DATA=../shared/data]
	python -m research.bench.training --data "$(DATA)"

bench-scoring: has-data .venv/.installed-bench  ## scores over HTTP against OpenRLHF's and vLLM's servers, within 15 minutes: make bench-scoring [DATA=../shared/data]
	python -m research.bench.scoring --data "$(DATA)"

bench-evaluation: has-data $(INSTALLED)  ## an evaluation's scores against one forward a response, within 10 minutes: make bench-evaluation [DATA=../shared/data]
	python -m research.bench.evaluation --data "$(DATA)"

bench-rloo: .venv/.installed-bench  ## RLOO steps against TRL, overlap, engines, weight updates; within 15 minutes
	python -m research.bench.rloo

bench-memory: $(INSTALLED)  ## peak memory of training against the longest completion in the data
	python -m research.bench.memory

bench-scaling: $(INSTALLED)  ## this machine's rates and small runs, for docs/SCALING.md: within 10 minutes, on a machine that does nothing else
	python -m research.bench.scaling

check-scaling: $(INSTALLED)  ## docs/SCALING.md's formulas against what was measured; fails where one misses a factor of two
	python -m research.scaling --check

study-rloo: $(INSTALLED)  ## RLOO with and without lag, and a reward model made to be over-optimised: three seeds each (an hour on 2 cores)
	python -m research.bench.rloo_study

study: $(INSTALLED)  ## the paper's claims re-tested: runs what docs/study/results.jsonl lacks (hours), then makes docs/STUDY.md [DATA=../shared/data]
	python -m research.study --data "$(DATA)"

study-quick: $(INSTALLED)  ## the same with two objectives, two seeds and the embedded world alone (20 minutes); writes only to runs/study_quick/
	python -m research.study --quick --worlds embedded

has-data:
	@test -f "$(DATA)/human_pairs.parquet" || { echo "There is no human_pairs.parquet in '$(DATA)': name the folder of real preference data, DATA=…" >&2; exit 2; }

# uv, because it can leave out a dependency (cpu-overrides.txt). It reads pip's find-links only when told; indexes it takes from UV_INDEX.
lock:  ## resolve requirements/cpu.lock and gpu.lock again (needs uv)
	@command -v uv >/dev/null || { echo "make lock needs uv, which can override a package's own requirements: pip install uv" >&2; exit 1; }
	UV_FIND_LINKS="$$(pip config get global.find-links 2>/dev/null)" uv pip compile pyproject.toml --extra cpu --extra test \
	    --override requirements/cpu-overrides.txt --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
	    --no-header --no-annotate --quiet --output-file requirements/cpu.lock
	uv pip compile pyproject.toml --extra gpu --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
	    --no-header --no-annotate --quiet --output-file requirements/gpu.lock

$(INSTALLED): pyproject.toml requirements/cpu.lock requirements/install.sh
	@PYTHON="$(PYTHON)" requirements/install.sh $(EXTRA)

# The lock as constraints: what the peers need beside their own versions is in it, and stays as it is.
.venv/.installed-bench: $(INSTALLED)
	@requirements/install.sh bench

.venv-compat/.installed: requirements/compat.lock requirements/install.sh
	@PYTHON="$(PYTHON)" requirements/install.sh compat
