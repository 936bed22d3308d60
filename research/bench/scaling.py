"""Measure this machine's rates, and small runs that test the formulas of docs/results/scaling.md.

    python -m research.bench.scaling          (make bench-scaling)
        Write docs/results/scaling_measured.json, and make the tables of docs/results/scaling.md again.
    python -m research.bench.scaling --quick --to /tmp/x.json
        Do a few steps of everything, to see that it works.

Run it on a machine that does nothing else. The rates are those of a process with one thread, alone, and of an engine
with the policy of 0.3 M parameters. The runs are shortened stages of tiny_cpu, as `pipelines/full_rlhf.py` runs them,
the peak memory of training, and weight updates of 20 M and 100 M parameters. Figures are medians. Runs of other benches
stay in the file.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from random import Random
from statistics import fmean, median
from typing import Any
from unittest.mock import patch

import torch
from scipy.optimize import nnls

from research.bench import memory as memory_bench
from research.bench import trainers, weight_sync
from research.scaling.__main__ import check, update_docs
from research.scaling.measured import Measurements
from research.scaling.tables import MEASURED
from research.scaling.training import Tokens, attention_calls
from rm_robust.cluster.environment import WORKER_ENVIRONMENT
from rm_robust.config.objectives import Objective
from rm_robust.config.shared import OptimizerConfig
from rm_robust.config.training import ModelConfig, RewardModelConfig
from rm_robust.data.demonstrations import make_tokenizer, save_base_model
from rm_robust.data.records import PreferencePair, TokenGroup
from rm_robust.data.token_files import read_token_groups
from rm_robust.models.attention import attend, every_column
from rm_robust.models.packing import Layout, lay_out
from rm_robust.models.reward_model import PackedRewardModel, new_reward_model
from rm_robust.rloo.rollout import GenerationRequest
from rm_robust.runs import files as run_files
from rm_robust.runs.layout import RunLayout
from rm_robust.runs.metrics import read_metrics
from rm_robust.training.engines.ddp import DdpEngine
from rm_robust.training.reward_model.step import StepSettings, reward_model_step
from tests.support.tiny_models import save_qwen2, sized_qwen2_config

CONFIG = "pipelines/configs/tiny_cpu.toml"
SHORTER: dict[str, float] = {
    "sft.num_epochs": 1,
    "reward_model.num_epochs": 1,
    "rloo.num_steps": 24,
    "world.num_training_prompts": 6000,
    "rloo.evaluation.every_steps": 0,
}
"""The changes to the config, as for `--set`. They leave enough steps for a median."""
QUICK: dict[str, float] = {
    "sft.num_epochs": 0.1,
    "reward_model.num_epochs": 0.2,
    "rloo.num_steps": 6,
    "world.num_training_prompts": 1500,
    "rloo.evaluation.every_steps": 0,
}
NUM_SKIPPED_STEPS = 3
"""The first steps of a stage, which are not counted: they fetch memory and start threads."""
MATMUL = (1024, 128, 256)
"""The sizes of a matrix product as large as a tiny model's."""
LONG_FLOATS = 32 * 2**20
"""The length of the long vectors: 128 MiB each, so no cache holds them."""
SHORT_FLOATS = 2**20
"""The length of the short vectors: 4 MiB, as a layer of a tiny model keeps more than one core's cache holds."""
GATED_PASSES = 17
"""The passes over short vectors that silu(gate) * up + residual and its gradient make.

Forward there are 2 + 3 + 3; backward there are 6 of the product and 3 of silu.
"""
CHAIN = 100
"""The number of modules in the chain, each with one tiny operator."""
ATTENDED = (32, 2, 16)
"""The number of prompts, the completions of each, and the tokens of each text.

The texts have fewer tokens than the attention kernel takes at a time.
"""
ATTENTION_HEADS = (4, 32)
"""The number of attention heads, and their size."""
REORDERED = 4096
"""The rows, and the columns, of the matrix that is transposed."""
ENGINE_THREADS = 1
SAMPLED = ((1, 64), (2, 24), (8, 32), (16, 12), (16, 64))
"""The number of prompts, and the tokens of the longest completion. The other lengths are spread evenly below it."""
SAMPLED_EACH = 4
"""The completions of each prompt."""
MEMORY_MODELS = {
    "5.2 M": memory_bench.MODEL,
    "20 M": ModelConfig(
        hidden_size=384, intermediate_size=1536, num_layers=6, num_heads=6, num_kv_heads=6, vocab_size=16384
    ),
}
UPDATE_MODELS = {
    "20 M": MEMORY_MODELS["20 M"],
    "100 M": ModelConfig(
        hidden_size=768, intermediate_size=3072, num_layers=8, num_heads=12, num_kv_heads=12, vocab_size=32768
    ),
}
MEMORY_TOKENS = 2048
PAIR_TOKENS = (64, 32, 32)
"""The tokens of a prompt and of its two completions."""
LARGE_PAIRS, LARGE_STEPS = 16, 4
LARGE_TOKENS = (144, 50)
"""The tokens of a prompt and of a completion, as in hh-rlhf's dialogues on average."""
LARGE_NAMES = {1: "reward-model step, 5.2 M, dialogues", 2: "reward-model step, 5.2 M, dialogues, 2 workers"}
LARGE_CHANGES = (
    "model.hidden_size=256",
    "model.intermediate_size=1024",
    "model.vocab_size=4096",
    "model.max_position_embeddings=1024",
    "reward_model.batch_size=16",
    "reward_model.objective=bt",
    "reward_model.bt_twin=false",
)
MIB = 2**20


def main() -> None:
    if sys.argv[1:2] == ["rates"]:
        print(json.dumps(rates(int(sys.argv[2]))))
        return
    if sys.argv[1:2] == ["memory"]:
        print(trainer_peak_mib(MEMORY_MODELS[sys.argv[2]], Path(sys.argv[3])))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument(
        "--to",
        type=Path,
        default=MEASURED,
        help="default: %(default)s, and then the tables of the documents are made again",
    )
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="rm") as scratch:
        measured = measure(Path(scratch), is_quick=arguments.quick)
    measured["source"] = (
        f"by `make bench-scaling`, after a load of {load:.1f}, "
        "and by the other benches on this machine (docs/results/benchmarks.md)."
    )
    keep_other_runs(measured, json.loads(MEASURED.read_text()))
    run_files.write_json(arguments.to, json.loads(Measurements.model_validate(measured).model_dump_json()))
    if arguments.to == MEASURED:
        update_docs(Path.cwd())
        sys.exit(check(Path.cwd()))


def keep_other_runs(measured: dict[str, Any], earlier: dict[str, Any]) -> None:
    """Add the runs that other benches measured, and this one does not."""
    for kind in ("training", "memory", "updates"):
        names = {run["name"] for run in measured[kind]}
        measured[kind] += [run for run in earlier[kind] if run["name"] not in names]


def measure(scratch: Path, *, is_quick: bool) -> dict[str, Any]:
    """Measure everything, and return the fields of Measurements except `source`."""
    progress("rates")
    calibrations = [json.loads(in_own_process("rates", "1"))]
    progress("weight updates, and an engine's steps")
    engine, updates = engine_and_updates(scratch, num_rounds=2 if is_quick else 7)
    progress("memory")
    memory = memory_runs(scratch)
    progress("steps of 5.2 M")
    steps = large_steps(scratch / "large", num_rounds=2 if is_quick else 5)
    progress("the stages of tiny_cpu")
    training, tiny_update = stage_runs(scratch / "run", QUICK if is_quick else SHORTER)
    training += steps
    machine = f"{os.cpu_count()} CPU cores ({cpu_name()}), no GPU, torch {torch.__version__}"
    return {
        "machine": machine,
        "is_calibrated": True,
        "calibrations": calibrations,
        "engine": engine,
        "training": training,
        "memory": memory,
        "updates": [*updates, tiny_update],
    }


def rates(num_threads: int) -> dict[str, float | tuple[float, float]]:
    """Measure this process's rates, and return the fields of Calibration.

    Operators other than matrix products run with their gradients, as in training.
    """
    torch.set_num_threads(num_threads)
    rows, inner, columns = MATMUL
    left, right = torch.randn(rows, inner), torch.randn(inner, columns)
    long, other, total = (torch.ones(LONG_FLOATS) for _ in range(3))
    matrix, reordered = torch.ones(REORDERED, REORDERED), torch.empty(REORDERED, REORDERED)
    gate, up, residual = (torch.randn(SHORT_FLOATS, requires_grad=True) for _ in range(3))
    gradient = torch.ones(SHORT_FLOATS)
    chain, tiny = torch.nn.Sequential(*(torch.nn.SiLU() for _ in range(CHAIN))), torch.ones(2, requires_grad=True)
    return {
        "num_threads": num_threads,
        "matmul_flops_per_s": 2 * rows * inner * columns / seconds_of(lambda: left @ right, repeats=200),
        "memory_bytes_per_s": 3 * 4 * LONG_FLOATS / seconds_of(lambda: torch.add(long, other, out=total), repeats=3),
        "activation_bytes_per_s": GATED_PASSES
        * 4
        * SHORT_FLOATS
        / seconds_of(
            lambda: torch.autograd.grad(torch.nn.functional.silu(gate) * up + residual, (gate, up, residual), gradient),
            repeats=10,
        ),
        "reorder_bytes_per_s": 2 * 4 * REORDERED**2 / seconds_of(lambda: reordered.copy_(matrix.t()), repeats=2),
        "kernel_s": seconds_of(lambda: torch.autograd.grad(chain(tiny).sum(), tiny), repeats=20) / (2 * CHAIN),
        "attention_call_s": attention_call_seconds(),
    }


def attention_call_seconds() -> tuple[float, float]:
    """Return the seconds of attention over short texts per operator that it calls, forward and backward."""
    num_prompts, num_completions, length = ATTENDED
    batch = lay_out(
        [TokenGroup([1] * length, [[1] * length] * num_completions)] * num_prompts, Layout.SEGMENTS, pad_id=0
    )
    query, key, value = (
        torch.randn(1, ATTENTION_HEADS[0], batch.num_tokens, ATTENTION_HEADS[1], requires_grad=True) for _ in range(3)
    )
    queries, gradient = every_column(batch.segments), torch.ones(1, batch.num_tokens, *ATTENTION_HEADS)

    def forward() -> torch.Tensor:
        return attend(query, key, value, batch.segments, queries, scale=1.0)

    forward_s = seconds_of(forward, repeats=5)
    both_s = seconds_of(lambda: torch.autograd.grad(forward(), (query, key, value), gradient), repeats=5)
    tokens = Tokens(batch.num_tokens, 0, num_prompts, num_completions)
    return forward_s / attention_calls(tokens, 0), (both_s - forward_s) / attention_calls(tokens, 1)


def seconds_of(call: Callable[[], object], *, repeats: int) -> float:
    """Return the seconds of a call: the median over rounds of `repeats` calls each. The first round does not count."""
    rounds = []
    for _ in range(8):
        started = time.perf_counter()
        for _ in range(repeats):
            call()
        rounds.append((time.perf_counter() - started) / repeats)
    return median(rounds[1:])


def engine_and_updates(scratch: Path, *, num_rounds: int) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Return an engine's own costs, measured with the policy of 0.3 M parameters, and updates of larger policies."""
    import ray
    from ray import cloudpickle

    os.environ["RAY_AUTH_MODE"] = "disabled"
    for module in (weight_sync, sys.modules[__name__]):
        cloudpickle.register_pickle_by_value(module)  # workers cannot import these files
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, _temp_dir=str(scratch))
    engine = engine_seconds(scratch / "engine")
    small = weight_sync.compare("0.3 M", is_tied=True, num_rounds=num_rounds, folder=scratch / "small")
    update_s = median(small.load_s)
    updates = []
    for size, model in UPDATE_MODELS.items():
        large = weight_sync.compare(size, is_tied=True, num_rounds=num_rounds, folder=scratch / size.replace(" ", ""))
        for kind, seconds in (("loaded", large.load_s), ("confirmed", large.update_s)):
            updates.append(
                {
                    "name": f"weight update, {size} tied, {kind}",
                    "model": model.model_dump(),
                    "kind": kind,
                    "measured": median(seconds),
                }
            )
    ray.shutdown()
    return engine | {"update_s": update_s, "probe_s": median(small.update_s) - update_s}, updates


def engine_seconds(folder: Path) -> dict[str, float]:
    """Return what a decoding step, a token and a completion cost.

    The costs are the non-negative least-squares fit over samplings of few and many, short and long completions.
    """
    import ray

    from rm_robust.cluster.environment import cpu_environment
    from rm_robust.rloo.engine import RolloutEngine

    save_qwen2(folder, sized_qwen2_config("0.3 M", tie_word_embeddings=True))
    engine: Any = (
        ray.remote(RolloutEngine)
        .options(runtime_env={"env_vars": cpu_environment(ENGINE_THREADS)})
        .remote(
            model_dir=str(folder),
            dtype="float32",
            max_model_len=256,
            seed=0,
            device="cpu",
            kv_cache_memory_bytes=64 * MIB,
            max_num_seqs=128,
            weight_transfer_backend="gloo",
            tensor_parallel_size=1,
        )
    )
    trainer: Any = (
        ray.remote(weight_sync.Trainer)
        .options(runtime_env={"env_vars": weight_sync.TRAINER_ENVIRONMENT})
        .remote(str(folder), engine)
    )
    ray.get(trainer.update.remote(0))
    counts, seconds = [], []
    for num_prompts, longest in SAMPLED:
        lengths = [max(1, longest * (i + 1) // num_prompts) for i in range(num_prompts)]
        counts.append((longest, SAMPLED_EACH * sum(lengths), SAMPLED_EACH * num_prompts))
        seconds.append(median(timed_generation(engine, lengths) for _ in range(7)))
    for actor in (engine, trainer):
        ray.kill(actor)
    costs, _ = nnls(counts, seconds)
    return {"step_s": costs[0], "token_s": costs[1], "completion_s": costs[2]}


def timed_generation(engine: Any, lengths: list[int]) -> float:
    """Return the seconds until the last completion arrives.

    Each length has one prompt, and no token stops a completion.
    """
    import ray

    requests = [
        GenerationRequest(str(i), [3 + i, 4, 5, 6], SAMPLED_EACH, length, 1.0, 1.0, [], seed=i)
        for i, length in enumerate(lengths)
    ]
    started = time.perf_counter()
    for finished in engine.generate.remote(requests):
        ray.get(finished)
    return time.perf_counter() - started


def memory_runs(scratch: Path) -> list[dict[str, Any]]:
    """Measure resident memory in separate trainers: of the activations alone, and of everything that training needs."""
    base = scratch / "packed"
    save_base_model(base, memory_bench.MODEL, make_tokenizer(["a b c"], vocab_size=300), seed=0)
    (way,) = (name for name, (layout, _) in memory_bench.WAYS.items() if layout is Layout.SEGMENTS)
    peak = median(memory_bench.in_own_process(way, length, str(base)) for length in memory_bench.LENGTHS[:3])
    measured = [
        memory_run(
            f"activations of {MEMORY_TOKENS:,} tokens, 5.2 M reward model",
            memory_bench.MODEL,
            peak,
            includes_states=False,
        )
    ]
    for size, model in MEMORY_MODELS.items():
        folder = scratch / f"memory{size.replace(' ', '')}"
        save_qwen2_of(folder, model)
        peak = float(in_own_process("memory", size, str(folder)))
        measured.append(
            memory_run(
                f"states and activations of {MEMORY_TOKENS:,} tokens, {size} reward model",
                model,
                peak,
                includes_states=True,
            )
        )
    return measured


def memory_run(name: str, model: ModelConfig, measured: float, *, includes_states: bool) -> dict[str, Any]:
    num_scored = 2 * MEMORY_TOKENS // sum(PAIR_TOKENS)
    batch = {"num_tokens": MEMORY_TOKENS, "num_scored": num_scored}
    return {
        "name": name,
        "model": model.model_dump(),
        **batch,
        "includes_states": includes_states,
        "measured": measured,
    }


def save_qwen2_of(folder: Path, model: ModelConfig) -> None:
    """Save a random policy with the whole vocabulary of `model`, which a tokenizer of a small text would not reach."""
    from transformers import Qwen2Config

    save_qwen2(
        folder,
        Qwen2Config(
            vocab_size=model.vocab_size,
            hidden_size=model.hidden_size,
            intermediate_size=model.intermediate_size,
            num_hidden_layers=model.num_layers,
            num_attention_heads=model.num_heads,
            num_key_value_heads=model.num_kv_heads,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            pad_token_id=0,
        ),
    )


def trainer_peak_mib(model: ModelConfig, folder: Path) -> float:
    """Return this process's peak memory in MiB during three steps of MEMORY_TOKENS.

    The memory that it holds after a step of a tiny model, which loads the libraries, is subtracted.
    """
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as tiny:
        save_qwen2(Path(tiny), sized_qwen2_config("0.3 M", tie_word_embeddings=True))
        train(Path(tiny), num_pairs=1, num_steps=1)
    before = memory_bench.peak_mib()
    train(folder, num_pairs=MEMORY_TOKENS // sum(PAIR_TOKENS), num_steps=3)
    return memory_bench.peak_mib() - before


def train(folder: Path, *, num_pairs: int, num_steps: int) -> None:
    rng = Random(0)
    packed = PackedRewardModel(new_reward_model(folder, pad_id=0, seed=0), Layout.SEGMENTS)
    engine = DdpEngine(packed, optimizer=OptimizerConfig(), device=torch.device("cpu"))
    objective = RewardModelConfig(objective=Objective.BATCH_SUM_TO_ZERO, bsr_coefficient=1e-3)
    settings = StepSettings(objective, MEMORY_TOKENS, pad_id=0)
    for _ in range(num_steps):
        texts = [[[rng.randrange(3, 250) for _ in range(count)] for count in PAIR_TOKENS] for _ in range(num_pairs)]
        pairs = [PreferencePair(TokenGroup(prompt, both)) for prompt, *both in texts]
        reward_model_step(engine, pairs, settings, model=packed, device=torch.device("cpu"))
        engine.step(1e-4)


def large_steps(folder: Path, *, num_rounds: int) -> list[dict[str, Any]]:
    """Measure Bradley-Terry steps of 16 pairs with the mean lengths of hh-rlhf's dialogues.

    One worker and two workers take turns, round by round.
    """
    save_qwen2_of(folder / "base", memory_bench.MODEL)
    new_reward_model(folder / "base", pad_id=0, seed=0).save_pretrained(str(folder / "model"))
    rng, (prompt, completion) = Random(0), LARGE_TOKENS

    def random_pair() -> TokenGroup:
        prompt_ids, chosen_ids, rejected_ids = (
            [rng.randrange(3, 4000) for _ in range(count)] for count in (prompt, completion, completion)
        )
        return TokenGroup(prompt_ids, [chosen_ids, rejected_ids])

    batches = [[random_pair() for _ in range(LARGE_PAIRS)] for _ in range(num_rounds * LARGE_STEPS)]
    work = trainers.Work(folder / "model", batches, LARGE_STEPS, pad_id=0)
    with patch.dict(os.environ, WORKER_ENVIRONMENT), ExitStack() as stack:
        contenders = [
            trainers.Contender(name, trainers.train_with_rm_robust, replace(work, world_size=count))
            for count, name in LARGE_NAMES.items()
        ]
        for contender in contenders:
            stack.enter_context(contender)
        for _ in range(num_rounds):
            for contender in contenders:
                contender.run_round()
    common = {
        "kind": "reward_model_step",
        "config": CONFIG,
        "num_threads": 1,
        "vocab_size": memory_bench.MODEL.vocab_size,
    }
    common |= {"prompt_tokens": prompt, "completion_tokens": completion}
    changes = {count: [*LARGE_CHANGES, f"reward_model.workers.num_workers={count}"] for count in LARGE_NAMES}
    return [
        common
        | {
            "name": contender.name,
            "overrides": changes[count],
            "measured": LARGE_PAIRS / median(contender.pairs_per_s),
        }
        for count, contender in zip(LARGE_NAMES, contenders, strict=True)
    ]


def stage_runs(run_dir: Path, changes: dict[str, float]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Run the pipeline, and return the median steps of each stage and the policy's weight update."""
    overrides = [f"--set={name}={value}" for name, value in {**changes, "reward_model.bt_twin": "false"}.items()]
    command = [sys.executable, "pipelines/full_rlhf.py", "--config", CONFIG, "--run-dir", str(run_dir), *overrides]
    # This process has set RAY_AUTH_MODE for its own cluster.
    environment = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"}
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    return stage_figures(run_dir)


def stage_figures(run_dir: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the median steps of each stage and the weight update from the files of a finished run of tiny_cpu."""
    layout = RunLayout(run_dir)
    vocab_size = json.loads((layout.sft_checkpoint / "config.json").read_text())["vocab_size"]
    sft, pairs = (
        read_token_groups(folder)
        for folder in (layout.sft_tokens / "scenario=sft", layout.preference_tokens / "scenario=train")
    )
    prompts = read_token_groups(layout.rloo_prompts / "scenario=rloo_prompts")
    prompt_tokens = fmean(len(row.tokens.prompt_ids) for row in prompts)
    sampled = of_stage(run_dir, "rloo", "rloo/completion_tokens_mean")

    def run(name: str, kind: str, num_threads: int, prompt: float, completion: float, seconds: float) -> dict[str, Any]:
        lengths = {"vocab_size": vocab_size, "prompt_tokens": prompt, "completion_tokens": completion}
        return {
            "name": name,
            "kind": kind,
            "config": CONFIG,
            "num_threads": num_threads,
            **lengths,
            "measured": seconds,
        }

    measured = [
        run(
            f"{title} step, tiny_cpu, 2 workers",
            f"{stage}_step",
            1,
            *mean_lengths(rows),
            of_stage(run_dir, stage, "time/step_s"),
        )
        for title, stage, rows in (("reward-model", "reward_model", pairs), ("SFT", "sft", sft))
    ]
    for part in ("generate", "measure", "update"):
        measured.append(
            run(
                f"RLOO {part}, tiny_cpu",
                f"rloo_{part}",
                1,
                prompt_tokens,
                sampled,
                of_stage(run_dir, "rloo", f"time/{part}_s"),
            )
        )
    update = {
        "name": "weight update, tiny_cpu, confirmed (time/weight_sync_s)",
        "model": {"vocab_size": vocab_size},
        "kind": "confirmed",
        "measured": of_stage(run_dir, "rloo", "time/weight_sync_s"),
    }
    return measured, update


def mean_lengths(rows: list[Any]) -> tuple[float, float]:
    """Return the mean tokens of a prompt and of a completion."""
    return fmean(len(row.tokens.prompt_ids) for row in rows), fmean(
        len(ids) for row in rows for ids in row.tokens.completion_ids
    )


def of_stage(run_dir: Path, stage: str, key: str) -> float:
    """Return the median of a metric over a stage's steps, without the first ones."""
    return median(float(line[key]) for line in read_metrics(run_dir, stage)[NUM_SKIPPED_STEPS:] if key in line)


def in_own_process(*arguments: str) -> str:
    """Run this file with `arguments` in the environment of a run's workers, and return the last line of its output."""
    environment = os.environ | WORKER_ENVIRONMENT
    done = subprocess.run(
        [sys.executable, "-m", "research.bench.scaling", *arguments],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    return done.stdout.splitlines()[-1]


def cpu_name() -> str:
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return names[0] if names else "unknown"


def progress(message: str) -> None:
    print(f"[{time.perf_counter() - STARTED_S:4.0f} s] {message}", flush=True)


STARTED_S = time.perf_counter()

if __name__ == "__main__":
    main()
