"""Weight updates of the RLOO bench: what a step takes to bring its weights to the engine, against a bare broadcast of as many bytes."""

from contextlib import ExitStack
from pathlib import Path

import torch

from rm_robust.config import ModelConfig
from tests.bench.gloo_broadcast import BareBroadcast
from tests.bench.rloo_ours import OurRun, Placement, Work, train_with_rm_robust
from tests.bench.rloo_policies import random_policy
from tests.bench.rloo_report import progress
from tests.bench.rloo_turns import Contender

WEIGHT_SIZES = {
    "0.3m": ModelConfig(hidden_size=64, intermediate_size=256, num_heads=2, num_kv_heads=2),
    "20m": ModelConfig(hidden_size=384, intermediate_size=1664, num_layers=8),
    "100m": ModelConfig(hidden_size=768, intermediate_size=3328, num_layers=10, num_heads=12, num_kv_heads=12),
}
WORK = Work(num_prompts=2, num_completions_per_prompt=2, max_new_tokens=4)
"""As little as a step can be: what counts is what follows it."""
PLACEMENT = Placement(engine_threads=2, trainer_threads=2)
STEPS_PER_ROUND = 3


def measure_weight_updates(names: list[str], folder: Path, cluster_id: int, num_rounds: int) -> dict[str, float]:
    """time/weight_sync_s of an RLOO run, from the controller's call to the engine's confirmation; and the broadcast, alternated."""
    figures: dict[str, float] = {}
    rows = []
    for name in names:
        policy = random_policy(folder / name / "policy", WEIGHT_SIZES[name])
        num_bytes = policy.num_parameters * torch.float32.itemsize
        with ExitStack() as stack:
            run = OurRun(folder / name / "r", policy, WORK, PLACEMENT)
            ours = Contender(f"rm_robust, {name}", train_with_rm_robust, run, stack, cluster_id=cluster_id)
            bare = BareBroadcast(num_bytes, folder / name / "bare", stack)
            ours.wait_until_ready()
            bare.wait_until_ready()
            for _ in range(num_rounds):
                ours.run_round(STEPS_PER_ROUND)
                bare.run_round(STEPS_PER_ROUND)
        sync_s = ours.phase_s("weight_sync")
        progress(f"weight update, {name}: {1000 * sync_s:.1f} ms, bare broadcast {1000 * bare.seconds:.1f} ms")
        rows.append(f"| {policy.num_parameters / 1e6:.1f} M parameters | {num_bytes / 1e6:.1f} | {1000 * sync_s:.1f} | {1000 * bare.seconds:.1f} | "
                    f"{sync_s / bare.seconds:.2f} |")  # fmt: skip
        figures |= {f"weight_sync_s_{name}": sync_s, f"broadcast_s_{name}": bare.seconds, f"weight_sync_ratio_{name}": sync_s / bare.seconds}
    print("\n| weight update, trainer to 1 engine | MB | ms, median | bare gloo broadcast, ms | ratio |\n" + "| --- " * 5 + "|")
    print("\n".join(rows) + "\n", flush=True)
    return figures
