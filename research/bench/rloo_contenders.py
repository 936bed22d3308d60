"""Define the contenders of the RLOO bench, and let them take turns."""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from research.bench.rloo_ours import OurRun, Placement, Work, train_with_rm_robust
from research.bench.rloo_policies import Policy
from research.bench.rloo_report import progress
from research.bench.rloo_trl import TrlRun, train_with_trl
from research.bench.rloo_turns import PASSIVE, Contender

WORK = Work(num_prompts=32, num_completions_per_prompt=4, max_new_tokens=48)
SYNC_1, SYNC_2, ASYNC_1 = "1 thread", "2 threads", "asynchronous, 1 thread each"
TWO_ENGINES, BFLOAT16 = "2 threads, 2 engines of 1", "2 threads, bfloat16"
OURS = {
    SYNC_1: Placement(engine_threads=1, trainer_threads=1),
    SYNC_2: Placement(engine_threads=2, trainer_threads=2),
    TWO_ENGINES: Placement(engine_threads=1, trainer_threads=2, num_engines=2),
    ASYNC_1: Placement(engine_threads=1, trainer_threads=1, max_policy_lag=1),
    BFLOAT16: Placement(engine_threads=2, trainer_threads=2, precision="bfloat16"),
}
TRL_1, TRL_2, TRL_2_PASSIVE = "TRL, 1 thread", "TRL, 2 threads", "TRL, 2 threads, passive"
TRL_BFLOAT16 = "TRL, 2 threads, passive, bfloat16 (its default)"
TRL: dict[str, dict[str, Any]] = {
    TRL_1: {"num_threads": 1},
    TRL_2: {"num_threads": 2},
    TRL_2_PASSIVE: {"num_threads": 2},
    TRL_BFLOAT16: {"num_threads": 2, "bfloat16": True},
}
"""TRL's settings by label. "passive" stands for OMP_WAIT_POLICY=PASSIVE, which all of our own settings have."""


@dataclass(frozen=True)
class Bench:
    """What all contenders of one policy share. `stack` ends the contenders."""

    name: str
    folder: Path
    policy: Policy
    cluster_id: int
    num_steps: int
    """The timed steps of a round."""
    stack: ExitStack

    def start_ours(self, labels: tuple[str, ...]) -> dict[str, Contender]:
        runs = {
            label: OurRun(self.folder / f"r{list(OURS).index(label)}", self.policy, WORK, OURS[label])
            for label in labels
        }
        ours = {
            label: Contender(f"rm_robust, {label}", train_with_rm_robust, run, self.stack, cluster_id=self.cluster_id)
            for label, run in runs.items()
        }
        return {label: contender.wait_until_ready() for label, contender in ours.items()}

    def start_trl(self) -> dict[str, Contender]:
        runs = {
            label: TrlRun(self.folder / f"t{number}", self.policy, WORK, **settings)
            for number, (label, settings) in enumerate(TRL.items())
        }
        peers = {
            label: Contender(label, train_with_trl, run, self.stack, environment=PASSIVE if "passive" in label else {})
            for label, run in runs.items()
        }
        return {label: contender.wait_until_ready() for label, contender in peers.items()}

    def alternate(self, contenders: list[Contender], num_rounds: int) -> None:
        """Forget earlier rounds, and run `num_rounds` new ones. Each round starts with another contender."""
        for contender in contenders:
            contender.forget_rounds()
        for number in range(num_rounds):
            first = number % len(contenders)
            for contender in (*contenders[first:], *contenders[:first]):
                contender.run_round(self.num_steps, [other for other in contenders if other is not contender])
            latest = ", ".join(f"{contender.rounds[-1].seconds_per_step:.2f}" for contender in contenders)
            progress(f"  {self.name}, round {number + 1} of {num_rounds}, s a step: {latest}")
