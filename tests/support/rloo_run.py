"""Run a whole RLOO stage on a tiny random policy, without the stages before it.

Ray's actors and vLLM are real; the test brings the scorers.
"""

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import psutil

from rm_robust.config.run import PipelineConfig
from rm_robust.data.chat import ChatFormat
from rm_robust.data.rows import RowKind
from rm_robust.runs.layout import RunLayout
from rm_robust.scoring.contract import ScoreInput, ScoreReply, ScoreResult
from tests.support.tiny_models import save_tiny_language_model, write_token_groups

FOUND_WITHIN_S = 60.0
POLL_EVERY_S = 0.005
WORDS = ["red", "green", "blue", "seven", "apples", "quiet", "river", "please"]


def rloo_config(folder: Path, **rloo: Any) -> PipelineConfig:
    """Return a config with a policy below `folder`, and 2 x 4 completions of at most 24 tokens per step.

    `rloo` overrides settings.
    """
    model_dir = folder / "policy"
    if not model_dir.exists():
        save_tiny_language_model(model_dir)
    settings = {
        "num_steps": 4,
        "num_prompts_per_step": 4,
        "num_completions_per_prompt": 2,
        "max_new_tokens": 24,
        "checkpoint_every_steps": 2,
        "engine_num_cpus": 0.1,
        "engine_num_threads": 1,
        "kv_cache_memory_bytes": 2**23,
        "optimizer": {"learning_rate": 1e-3, "warmup_fraction": 0.0},
        "trainers": {"num_workers": 1, "num_cpus_per_worker": 0.1},
        "target_kl": 0.5,
        "evaluation": {"every_steps": 2, "num_prompts": 4},
        **rloo,
    }
    return PipelineConfig.model_validate(
        {"name": "faults", "model": {"path": str(model_dir)}, "sft": {"enabled": False}, "rloo": settings}
    )


def rloo_run_dir(config: PipelineConfig, run_dir: Path, *, num_prompts: int = 16) -> Path:
    """Make `run_dir` a run directory that has reached the RLOO stage, and return it."""
    rng = Random(0)
    rows: list[dict[str, object]] = [
        {"id": f"p{i}", "prompt": " ".join(rng.choices(WORDS, k=6))} for i in range(num_prompts)
    ]
    assert config.model.path is not None
    write_token_groups(
        RunLayout(run_dir).rloo_prompts / "scenario=rloo_prompts",
        rows,
        kind=RowKind.PROMPT,
        chat=ChatFormat.load(config.model.path),
    )
    return run_dir


class LengthScorer:
    """A scorer that calls `before(inputs)`, and then scores a text with minus a tenth of its length."""

    def __init__(self, before: Callable[[Sequence[ScoreInput]], None] = lambda inputs: None) -> None:
        self._before = before

    def score(self, inputs: Sequence[ScoreInput]) -> ScoreReply:
        self._before(inputs)
        results = [ScoreResult(scores=[-len(text) / 10 for text in item.completions]) for item in inputs]
        return ScoreReply(model="length", checkpoint="length", results=results)


def actor_processes(name: str) -> list[psutil.Process]:
    """Return the processes of this Ray session's actors of the class `name`."""
    processes = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.name().startswith(f"ray::{name}") or (process.cmdline() or [""])[0].startswith(f"ray::{name}"):
                processes.append(process)
        except psutil.NoSuchProcess:
            continue
    return processes


def wait_for(condition: Callable[[], bool], *, what: str) -> None:
    deadline_s = time.monotonic() + FOUND_WITHIN_S
    while not condition():
        assert time.monotonic() < deadline_s, f"{what} did not come within {FOUND_WITHIN_S:g} s"
        time.sleep(POLL_EVERY_S)


class Killer:
    """Kill one process of an actor class with SIGKILL while it works, once `when` holds. Then `killed` is set."""

    def __init__(self, actor_class: str, when: Callable[[], bool]) -> None:
        self.killed = threading.Event()
        self._actor_class, self._when = actor_class, when
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        wait_for(self._when, what="the moment to kill")
        [victim, *_] = actor_processes(self._actor_class)
        before_s = victim.cpu_times().user
        wait_for(lambda: victim.cpu_times().user > before_s, what=f"work of {self._actor_class}")
        victim.kill()
        self.killed.set()
