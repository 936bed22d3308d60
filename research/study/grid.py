"""The runs of the study: objectives, worlds and seeds, the config of each run, and the key under which its row is kept.

Nothing here starts Ray.
"""

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
"""The overrides of [reward_model] by variant.

The names of BSR variants give the effective coefficient. bsr_micro is BSR as in the released code: 1e-3 x 16 on the
mean of every 16 pairs.
"""
PAPERS_BSR = "bsr_0.1"
"""The variant that stands for BSR where one must.

By this project's default scaling, the paper's 1e-3 at its batch of 128 is 0.128. The released code's BSR is bsr_micro.
"""
WORLDS = ("embedded", "rmb")
DECIDING: dict[Part, set[str]] = {"reward_model": {"seed", "world", "data", "model", "sft", "reward_model"}}
DECIDING["rloo"] = DECIDING["reward_model"] | {"serve", "rloo"}
"""The sections of the config that a run's numbers depend on, by part."""


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
    """A study: its variants and seeds, and the overrides that all its runs have."""

    name: str
    variants: tuple[str, ...]
    seeds: tuple[int, ...]
    rloo_seeds: tuple[int, ...]
    overrides: tuple[str, ...] = ()

    def cells(self, worlds: tuple[str, ...]) -> list[Cell]:
        """Return all runs, seed by seed, so that a study that is stopped half-way has complete comparisons."""
        reward_models = [
            Cell("reward_model", world, variant, seed)
            for seed in self.seeds
            for world in worlds
            for variant in self.variants
        ]
        rloo = [Cell("rloo", "embedded", variant, seed) for seed in self.rloo_seeds for variant in ("bt", PAPERS_BSR)]
        return reward_models + (rloo if "embedded" in worlds else [])

    def config(self, cell: Cell, configs_dir: Path) -> PipelineConfig:
        objective = [f"reward_model.{setting}" for setting in VARIANTS[cell.variant]]
        return load_config(configs_dir / f"study_{cell.world}.toml", [f"seed={cell.seed}", *objective, *self.overrides])


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
    """Return `config` with the defaults in every section that comes after the reward model."""
    return config.model_copy(
        update={
            "evaluation": EvaluationConfig(),
            "serve": ServeConfig(),
            "rloo": RlooConfig(),
            "tracking": TrackingConfig(),
        }
    )


def base_config(config: PipelineConfig) -> PipelineConfig:
    """Return `config` with the defaults in every section that the stages before the reward model do not depend on."""
    return reward_model_config(config).model_copy(
        update={"reward_model": RewardModelConfig(objective=Objective.BRADLEY_TERRY)}
    )


def key_of(cell: Cell, config: PipelineConfig) -> str:
    """Return the key of the cell's row: a hash of what decides the run's numbers, and the part."""
    return f"{digest(config, cell.part)}-{cell.part}"


def digest(config: PipelineConfig, part: Part) -> str:
    """Return 12 hexadecimal digits of the SHA-256 of what decides a run's numbers.

    The run's name, its place and the number of its workers do not count.
    """
    sections = json.loads(config.model_dump_json(include=DECIDING[part]))
    for stage in ("sft", "reward_model"):
        del sections[stage]["workers"]  # any number of workers takes the same steps
    del sections["data"]["task_resources"]  # the rows are the same on any nodes
    return hashlib.sha256(json.dumps(sections, sort_keys=True).encode()).hexdigest()[:12]
