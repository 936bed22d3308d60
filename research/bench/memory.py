"""Measure how the peak memory of packed training depends on the longest completion, at a fixed token budget.

    python -m research.bench.memory          (make bench-memory)

A batch has 31 short synthetic pairs (64 + 2 x 32 tokens) and one pair whose completions are as long as the column says.
Each figure comes from a process of its own: its peak resident memory during two optimiser steps, less what it held
before the first step. The control pads the whole batch to its longest sequence, as some trainers do, and its memory
grows. The last line is JSON.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from random import Random

import torch

from rm_robust.config.objectives import Objective
from rm_robust.config.shared import OptimizerConfig
from rm_robust.config.training import ModelConfig, RewardModelConfig
from rm_robust.data.demonstrations import make_tokenizer, save_base_model
from rm_robust.data.records import PreferencePair, TokenGroup
from rm_robust.models.packing import Layout
from rm_robust.models.reward_model import PackedRewardModel, new_reward_model
from rm_robust.training.engines.ddp import DdpEngine
from rm_robust.training.reward_model.step import StepSettings, reward_model_step

LENGTHS = (32, 128, 256, 512, 960)
"""The tokens of the longest completions. 64 + 2 x 960 tokens fill the budget."""
BUDGET_TOKENS = 2048
MODEL = ModelConfig(
    hidden_size=256,
    intermediate_size=1024,
    num_layers=4,
    num_heads=4,
    num_kv_heads=4,
    vocab_size=4096,
    max_position_embeddings=1024,
)
WAYS = {
    "packed, micro-batches within the budget": (Layout.SEGMENTS, BUDGET_TOKENS),
    "control: one padded batch": (Layout.PADDED, 10**9),
}


def main() -> None:
    if len(sys.argv) > 1:
        measure(*WAYS[sys.argv[1]], int(sys.argv[2]), Path(sys.argv[3]))
        return
    with tempfile.TemporaryDirectory(prefix="rm_robust_bench_") as scratch:
        save_base_model(Path(scratch), MODEL, make_tokenizer(["a b c"], vocab_size=300), seed=0)
        peaks = {name: [in_own_process(name, length, scratch) for length in LENGTHS] for name in WAYS}
    print(
        f"| peak MiB in training, budget {BUDGET_TOKENS} tokens | "
        + " | ".join(f"longest {length}" for length in LENGTHS)
        + " |"
    )
    print("| --- " * (1 + len(LENGTHS)) + "|")
    for name, values in peaks.items():
        print(f"| {name} | " + " | ".join(f"{value:.0f}" for value in values) + " |")
    ours, peer = (round(max(values) / values[0], 3) for values in peaks.values())
    print(
        json.dumps(
            {
                "bench": "memory",
                "ours": ours,
                "peer": peer,
                "ratio": round(ours / peer, 3),
                "unit": f"largest peak over the peak at {LENGTHS[0]}",
            }
        )
    )


def in_own_process(name: str, length: int, base: str) -> float:
    done = subprocess.run(
        [sys.executable, "-m", "research.bench.memory", name, str(length), base],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return float(done.stdout.splitlines()[-1])


def measure(layout: Layout, budget_tokens: int, length: int, base: Path) -> None:
    """Train in this process and print its peak memory in MiB."""
    torch.set_num_threads(1)
    rng = Random(0)

    def pair(completion_tokens: int) -> PreferencePair:
        prompt, *both = (
            [rng.randrange(3, 250) for _ in range(count)] for count in (64, completion_tokens, completion_tokens)
        )
        return PreferencePair(TokenGroup(prompt, both))

    model = new_reward_model(base, pad_id=0, seed=0)
    packed = PackedRewardModel(model, layout)
    engine = DdpEngine(packed, optimizer=OptimizerConfig(), device=torch.device("cpu"))
    objective = RewardModelConfig(objective=Objective.BATCH_SUM_TO_ZERO, bsr_coefficient=1e-3)
    settings = StepSettings(objective, budget_tokens, pad_id=0)
    reward_model_step(
        engine, [pair(4)], settings, model=packed, device=torch.device("cpu")
    )  # libraries, optimiser state
    engine.step(1e-4)
    before = peak_mib()
    for _ in range(2):
        reward_model_step(
            engine, [pair(32) for _ in range(31)] + [pair(length)], settings, model=packed, device=torch.device("cpu")
        )
        engine.step(1e-4)
    print(peak_mib() - before)


def peak_mib() -> float:
    """Return the peak resident memory of this process in MiB.

    ru_maxrss would not do: it starts with the size of the parent process.
    """
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    main()
