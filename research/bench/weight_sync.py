"""Compare weight updates of a vLLM engine with a bare gloo broadcast of the same bytes, on random Qwen2 policies.

    python -m research.bench.weight_sync

An update is WeightPublisher.publish as RLOO calls it. `loaded` is the time until the engine has checked, loaded and
packed the bytes. `confirmed` is the time until the engine may generate, after the probe on both sides. The bare
broadcast is torch.distributed's, between two processes, of one buffer that both allocated before. It ends when the
receiver has the buffer. Rounds alternate: one update, one broadcast. CPU seconds are those of both processes together;
two cores cannot do an update in less than half of them.

The last line is JSON. Its ratio is the largest `loaded` ratio of the 20 M and 100 M policies, and `small_s` is the
longest confirmed update of 0.3 M.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray import cloudpickle

from rm_robust.cluster.environment import cpu_environment
from rm_robust.models.packing import Layout
from rm_robust.models.policy import PackedPolicy, load_policy
from rm_robust.rloo.engine import RolloutEngine
from rm_robust.rloo.weights.probe import policy_probe
from rm_robust.rloo.weights.publisher import SyncReport, WeightPublisher
from tests.support.tiny_models import save_qwen2, sized_qwen2_config

SIZES = ("0.3 M", "20 M", "100 M")
MIB = 2**20
TIMEOUT_S = 120.0
NUM_THREADS = 1
"""The threads of each process: there are two processes and two cores."""
TRAINER_ENVIRONMENT = {"OMP_NUM_THREADS": str(NUM_THREADS), "OMP_WAIT_POLICY": "PASSIVE"}
NUM_WARM_UP_UPDATES = 3
"""The updates that are not counted, because the first ones fetch memory from the system."""


@dataclass(frozen=True)
class Comparison:
    """The seconds of each round for one policy."""

    size: str
    is_tied: bool
    num_bytes: int
    load_s: list[float]
    update_s: list[float]
    broadcast_s: list[float]
    update_cpu_s: list[float]
    broadcast_cpu_s: list[float]

    @property
    def name(self) -> str:
        return f"{self.size} {'tied' if self.is_tied else 'untied'}"

    @property
    def ratio(self) -> float:
        return median(self.load_s) / median(self.broadcast_s)

    @property
    def confirmed_ratio(self) -> float:
        return median(self.update_s) / median(self.broadcast_s)


class BarePeer:
    """One end of the bare broadcast, in a process of its own or in the trainer's."""

    def join(self, init_method: str, rank: int, num_bytes: int) -> None:
        dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=2)
        self.buffer = torch.ones(num_bytes, dtype=torch.uint8)

    def broadcast(self) -> float:
        """Return the seconds from the time when both ends are ready until this end is done."""
        dist.barrier()
        start_s = time.perf_counter()
        dist.broadcast(self.buffer, 0)
        return time.perf_counter() - start_s


class Trainer(BarePeer):
    """A policy that changes before every update, and the sender of the bare broadcast."""

    def __init__(self, model_dir: str, engine: Any) -> None:
        policy = PackedPolicy(load_policy(model_dir, dtype=torch.float32), Layout.SEGMENTS, temperature=1.0)
        self.model = policy.model
        self.publisher = WeightPublisher(
            [engine],
            policy.model,
            backend="gloo",
            tensor_parallel_size=1,
            timeout_s=TIMEOUT_S,
            probe=policy_probe(policy),
        )

    @torch.no_grad()
    def update(self, version: int) -> SyncReport:
        for parameter in self.model.parameters():
            parameter.mul_(1.001)
        return self.publisher.publish(version)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=SIZES)
    arguments = parser.parse_args()
    machine = f"{os.cpu_count()} CPU cores, load {os.getloadavg()[0]:.1f}; {NUM_THREADS} thread a process"
    print(f"torch {torch.__version__}, ray {ray.__version__}; {machine}", flush=True)
    print(
        json.dumps(
            {"bench": "weight_sync", "unit": "s"}
            | measure_weight_updates(arguments.sizes, arguments.rounds, ties=(True, False))
        )
    )


def measure_weight_updates(sizes: Sequence[str], num_rounds: int, *, ties: Sequence[bool]) -> dict[str, str | float]:
    """Measure all updates, print the table, and return the figures of the last line.

    `ties` says whether embeddings are tied, not tied, or both in turn. The process must not be connected to Ray.
    """
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="rm") as scratch:  # socket paths must be short
        os.environ["RAY_AUTH_MODE"] = "disabled"
        cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this file
        ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, _temp_dir=scratch)
        comparisons = [
            compare(
                size,
                is_tied=is_tied,
                num_rounds=num_rounds,
                folder=Path(scratch) / f"{size}-{is_tied}".replace(" ", ""),
            )
            for size in sizes
            for is_tied in ties
        ]
        ray.shutdown()
    print_table(comparisons)
    return figures_of(comparisons)


def compare(size: str, *, is_tied: bool, num_rounds: int, folder: Path) -> Comparison:
    """Run alternating rounds of updates and bare broadcasts of as many bytes, after some of each that do not count."""
    save_qwen2(folder, sized_qwen2_config(size, tie_word_embeddings=is_tied))
    engine: Any = (
        ray.remote(RolloutEngine)
        .options(runtime_env={"env_vars": cpu_environment(NUM_THREADS)})
        .remote(
            model_dir=str(folder),
            dtype="float32",
            max_model_len=512,
            seed=0,
            device="cpu",
            kv_cache_memory_bytes=64 * MIB,
            max_num_seqs=64,
            weight_transfer_backend="gloo",
            tensor_parallel_size=1,
        )
    )
    trainer: Any = (
        ray.remote(Trainer).options(runtime_env={"env_vars": TRAINER_ENVIRONMENT}).remote(str(folder), engine)
    )
    receiver: Any = ray.remote(BarePeer).options(runtime_env={"env_vars": TRAINER_ENVIRONMENT}).remote()
    num_bytes = [ray.get(trainer.update.remote(0)).num_bytes for _ in range(NUM_WARM_UP_UPDATES)][-1]
    with tempfile.NamedTemporaryFile(dir=folder) as rendezvous:
        ray.get(
            [
                peer.join.remote(f"file://{rendezvous.name}", rank, num_bytes)
                for rank, peer in enumerate((trainer, receiver))
            ]
        )
        ray.get([peer.broadcast.remote() for peer in (trainer, receiver)])
    comparison = Comparison(size, is_tied, num_bytes, [], [], [], [], [])
    for version in range(1, num_rounds + 1):
        before_s = cpu_seconds(trainer, engine)
        report = ray.get(trainer.update.remote(version))
        comparison.load_s.append(report.load_seconds)
        comparison.update_s.append(report.seconds)
        comparison.update_cpu_s.append(cpu_seconds(trainer, engine) - before_s)
        before_s = cpu_seconds(trainer, receiver)
        comparison.broadcast_s.append(max(ray.get([peer.broadcast.remote() for peer in (trainer, receiver)])))
        comparison.broadcast_cpu_s.append(cpu_seconds(trainer, receiver) - before_s)
    for actor in (engine, trainer, receiver):
        ray.kill(actor)
    print(f"{comparison.name}: ratio {comparison.ratio:.2f}, load {os.getloadavg()[0]:.1f}", flush=True)
    return comparison


def cpu_seconds(*actors: Any) -> float:
    return float(sum(ray.get([actor.__ray_call__.remote(lambda _: time.process_time()) for actor in actors])))


def print_table(comparisons: list[Comparison]) -> None:
    print(
        "\n| policy | MB | loaded, median s | confirmed, median s | bare broadcast, median s | ratio "
        "| confirmed, ratio | CPU s of both | loaded | broadcasts |"
    )
    print("| --- " * 10 + "|")
    for c in comparisons:
        updates, broadcasts = (" ".join(f"{seconds:.3f}" for seconds in rounds) for rounds in (c.load_s, c.broadcast_s))
        seconds = f"{median(c.load_s):.4f} | {median(c.update_s):.4f} | {median(c.broadcast_s):.4f}"
        cpu = f"{median(c.update_cpu_s):.3f}, {median(c.broadcast_cpu_s):.3f}"
        print(
            f"| {c.name} | {c.num_bytes / 1e6:.1f} | {seconds} | {c.ratio:.2f} | {c.confirmed_ratio:.2f} "
            f"| {cpu} | {updates} | {broadcasts} |"
        )
    print()


def figures_of(comparisons: list[Comparison]) -> dict[str, str | float]:
    """Return the figures of the worst large policy, the longest small update, and all ratios."""
    result: dict[str, str | float] = {}
    large = [c for c in comparisons if c.size != "0.3 M"]
    if large:
        worst = max(large, key=lambda c: c.ratio)
        result |= {
            "policy": worst.name,
            "ours": round(median(worst.load_s), 4),
            "peer": round(median(worst.broadcast_s), 4),
            "ratio": round(worst.ratio, 3),
        }
    small = [c for c in comparisons if c.size == "0.3 M"]
    if small:
        result |= {"small_s": round(max(median(c.update_s) for c in small), 4)}
    return result | {f"ratio {c.name}": round(c.ratio, 3) for c in comparisons}


if __name__ == "__main__":
    main()
