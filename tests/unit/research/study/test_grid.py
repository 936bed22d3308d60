"""A study's cells are complete and valid, and a row's key follows what decides its numbers."""

from pathlib import Path

from research.study.grid import FULL, QUICK, VARIANTS, WORLDS, Cell, Plan, key_of
from rm_robust.config.objectives import BsrScale, BsrScope, Objective

CONFIGS_DIR = Path("pipelines/configs")


def key(cell: Cell, *overrides: str) -> str:
    return key_of(cell, Plan("study", tuple(VARIANTS), (0,), (), overrides).config(cell, CONFIGS_DIR))


def test_the_whole_study_is_every_objective_seed_and_world_and_rloo_against_twins() -> None:
    cells = FULL.cells(WORLDS)
    assert len(set(cells)) == len(cells) == 9 * 5 * 2 + 2 * 3
    assert {cell.variant for cell in cells if cell.part == "rloo"} == {"bt", "bsr_0.1"}


def test_every_cell_has_a_valid_config_and_a_key_of_its_own() -> None:
    for plan in (FULL, QUICK):
        cells = plan.cells(WORLDS)
        assert len({key_of(cell, plan.config(cell, CONFIGS_DIR)) for cell in cells}) == len(cells)


def test_bsr_variants_have_the_effective_coefficients_of_their_names() -> None:
    for name in ("bsr_0.03", "bsr_0.1", "bsr_1"):
        settings = FULL.config(Cell("reward_model", "embedded", name, 0), CONFIGS_DIR).reward_model
        assert (settings.objective, settings.bsr_scale, settings.bsr_coefficient) == (
            Objective.BATCH_SUM_TO_ZERO,
            BsrScale.NONE,
            float(name[4:]),
        )
    micro = FULL.config(Cell("reward_model", "embedded", "bsr_micro", 0), CONFIGS_DIR).reward_model
    assert (micro.bsr_scope, micro.bsr_scale, micro.bsr_micro_pairs, micro.bsr_coefficient) == (
        BsrScope.MICRO,
        BsrScale.PAIRS,
        16,
        1e-3,
    )


def test_a_reward_models_key_follows_its_training_and_not_rloo() -> None:
    reward_model, policy = Cell("reward_model", "embedded", "bt", 0), Cell("rloo", "embedded", "bt", 0)
    assert key(reward_model, "rloo.num_steps=5") == key(reward_model) != key(reward_model, "reward_model.batch_size=32")
    assert key(policy, "rloo.num_steps=5") != key(policy) != key(policy, "reward_model.batch_size=32")
    assert key(reward_model) == key(
        reward_model,
        "name=other",
        "reward_model.workers.num_workers=2",
        "data.task_resources={data=1}",
        'tracking.wandb_project="other"',
    )
