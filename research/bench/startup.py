"""Measure the start-up of a smoke run: everything but its training and RLOO steps.

    python -m research.bench.startup
    python -m research.bench.startup --against ../other    # a checkout of another version, with its own .venv/

With --against, the two run in turns. A round takes about a minute for each.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rm_robust.runs.layout import STAGES, RunLayout

HERE = Path(__file__).resolve().parents[2]
STEP_TIMES = ("time/step_s", "time/evaluate_s")
NUM_ROUNDS = 3


def seconds_of_a_run(checkout: Path, run_dir: Path) -> dict[str, float]:
    """Run the smoke config with a checkout's own environment, and return the seconds of all, start-up and stages."""
    command = ["pipelines/full_rlhf.py", "--config", "pipelines/configs/smoke.toml", "--run-dir", str(run_dir)]
    python = checkout / ".venv" / "bin" / "python"
    environment = os.environ | {"PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}"}
    started_s = time.perf_counter()
    subprocess.run([python, *command], cwd=checkout, env=environment, check=True, capture_output=True)
    seconds = {"all": time.perf_counter() - started_s}
    layout = RunLayout(run_dir)
    lines = [json.loads(line) for line in layout.metrics.read_text().splitlines()]
    seconds["start-up"] = seconds["all"] - sum(float(line.get(name, 0.0)) for line in lines for name in STEP_TIMES)
    return seconds | {stage.name: float(layout.stage_result(stage.name)["seconds"]) for stage in STAGES}


def table(rounds: dict[str, list[dict[str, float]]]) -> list[str]:
    """Return a Markdown table of the medians, a row for each checkout, and the start-up of each round."""
    parts = list(next(iter(rounds.values()))[0])
    lines = [
        f"| seconds, median | {' | '.join(parts)} | start-up of each round |",
        "| --- |" + " --- |" * (len(parts) + 1),
    ]
    for name, runs in rounds.items():
        medians = [f"{statistics.median(run[part] for run in runs):.1f}" for part in parts]
        each = " ".join(f"{run['start-up']:.1f}" for run in runs)
        lines.append(f"| {name} | {' | '.join(medians)} | {each} |")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="a checkout of another version, with its own .venv/")
    parser.add_argument("--rounds", type=int, default=NUM_ROUNDS)
    options = parser.parse_args(arguments)
    checkouts = ([options.against.resolve()] if options.against else []) + [HERE]
    names = dict(zip(checkouts, ["the other version", "this version"][-len(checkouts) :], strict=True))
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in names.values()}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds):
            for checkout, name in names.items():
                run = seconds_of_a_run(checkout, Path(folder) / f"{name.split()[1]}-{number}")
                print(f"round {number + 1}, {name}: start-up {run['start-up']:.1f} s of {run['all']:.1f} s", flush=True)
                rounds[name].append(run)
    print("\n".join(table(rounds)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
