"""What the study runs: objectives, worlds and seeds; the config of each run, and the key under which its row is kept. Nothing here starts Ray."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rm_robust.config.loading import load_config
from rm_robust.config.objectives import Objective
from rm_robust.config.rloo import RlooConfig
from rm_robust.config.run import EvaluationConfig, PipelineConfig, ServeConfig, TrackingConfig
from rm_robust.config.training import RewardModelConfig

Part = Literal["reward_model", "rloo"]

VARIANTS: dict[str, tuple[str, ...]] = {
    "bt": ('objective="bt"',),
    "hinge": ('objective="hinge"', "margin=1.0"),
    "bt_norm": ('objective="bt_norm"',),
    "bt_dr": ('objective="bt_dr"',),
    "centering": ('objective="centering"',),
    "bsr_0.03": ('objective="bsr"', 'bsr_scale="none"', "bsr_coefficient=0.03"),
    "bsr_0.1": ('objective="bsr"', 'bsr_scale="none"', "bsr_coefficient=0.1"),
    "bsr_1": ('objective="bsr"', 'bsr_scale="none"', "bsr_coefficient=1.0"),
    "bsr_micro": ('objective="bsr"', 'preset="released_code"', "bsr_micro_pairs=16"),
}
"""Overrides of [reward_model]. BSR by its effective coefficient; bsr_micro is the released code's: 1e-3 x 16 on the mean of every 16 pairs."""
PAPERS_BSR = "bsr_0.1"
"""What stands for BSR where one must: by this project's default scaling the paper's 1e-3 at its batch of 128 is 0.128. The released code's is bsr_micro."""
WORLDS = ("embedded", "rmb")
DECIDING: dict[Part, set[str]] = {"reward_model": {"seed", "world", "data", "model", "sft", "reward_model"}}
DECIDING["rloo"] = DECIDING["reward_model"] | {"serve", "rloo"}
"""Sections of the config that a run's numbers depend on."""


@dataclass(frozen=True)
class Cell:
    """One run: a reward model, or RLOO against the reward model of the same world, variant and seed."""

    part: Part
    world: str
    variant: str
    seed: int

    def __str__(self) -> str:
        return f"{self.part} {self.world} {self.variant} seed {self.seed}"


@dataclass(frozen=True)
class Plan:
    """A study: its cells, and the overrides that all of them have."""

    name: str
    variants: tuple[str, ...]
    seeds: tuple[int, ...]
    rloo_seeds: tuple[int, ...]
    overrides: tuple[str, ...] = ()

    def cells(self, worlds: tuple[str, ...]) -> list[Cell]:
        """Seed by seed, so that a study that is stopped half-way has whole comparisons."""
        reward_models = [
            Cell("reward_model", world, variant, seed)
            for seed in self.seeds
            for world in worlds
            for variant in self.variants
        ]
        rloo = [Cell("rloo", "embedded", variant, seed) for seed in self.rloo_seeds for variant in ("bt", PAPERS_BSR)]
        return reward_models + (rloo if "embedded" in worlds else [])

    def config(self, cell: Cell, configs_dir: Path) -> PipelineConfig:
        own = [f"reward_model.{setting}" for setting in VARIANTS[cell.variant]]
        return load_config(configs_dir / f"study_{cell.world}.toml", [f"seed={cell.seed}", *own, *self.overrides])


FULL = Plan("study", tuple(VARIANTS), (0, 1, 2, 3, 4), (0, 1, 2))
QUICK = Plan(
    "study_quick",
    ("bt", PAPERS_BSR),
    (0, 1),
    (0,),
    (
        "world.num_training_prompts=1500",
        "world.num_sft_examples=6000",
        "reward_model.num_evaluation_pairs=200",
        "rloo.num_steps=40",
    ),
)


def reward_model_config(config: PipelineConfig) -> PipelineConfig:
    """As far as a reward model depends on it: what comes after it as the defaults have it."""
    return config.model_copy(
        update={
            "evaluation": EvaluationConfig(),
            "serve": ServeConfig(),
            "rloo": RlooConfig(),
            "tracking": TrackingConfig(),
        }
    )


def base_config(config: PipelineConfig) -> PipelineConfig:
    """As far as the stages before the reward model depend on it."""
    return reward_model_config(config).model_copy(
        update={"reward_model": RewardModelConfig(objective=Objective.BRADLEY_TERRY)}
    )


def key_of(cell: Cell, config: PipelineConfig) -> str:
    """Of what decides the run's numbers."""
    return f"{digest(config, cell.part)}-{cell.part}"


def digest(config: PipelineConfig, part: Part) -> str:
    """Twelve hexadecimal digits of the SHA-256 of what decides a run's numbers: not its name, nor where and by how many workers it was trained."""
    sections = json.loads(config.model_dump_json(include=DECIDING[part]))
    for stage in ("sft", "reward_model"):
        del sections[stage]["workers"]  # any number of them takes the same steps
    del sections["data"]["task_resources"]  # the same rows on whatever nodes
    return hashlib.sha256(json.dumps(sections, sort_keys=True).encode()).hexdigest()[:12]
