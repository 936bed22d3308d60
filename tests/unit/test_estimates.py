"""The table in docs/RECIPES.md is the formula's, and the formula does what memory does."""

import itertools
from pathlib import Path

from rm_robust.config_loading import load_config
from rm_robust.estimates import BYTES_PER_PARAMETER, GIB, NUM_GPUS, WORKLOADS, epoch_hours, memory_gib, table

REPOSITORY = Path(__file__).parents[2]


def test_the_documented_table_is_what_the_formula_gives() -> None:
    assert table() in (REPOSITORY / "docs" / "RECIPES.md").read_text()


def test_every_workload_is_a_recipe_with_its_own_micro_batch() -> None:
    for work in WORKLOADS:
        config = load_config(REPOSITORY / "pipelines" / "configs" / f"{work.recipe}.toml", [])
        assert config.reward_model.max_tokens_per_micro_batch == work.micro_batch_tokens
        assert config.reward_model.compute.gradient_checkpointing


def test_more_gpus_need_less_memory_each_and_less_time_down_to_what_is_not_sharded() -> None:
    for work in WORKLOADS:
        for fewer, more in itertools.pairwise(NUM_GPUS[1:]):
            assert memory_gib(work, more) < memory_gib(work, fewer)
            assert epoch_hours(work, more) * more == epoch_hours(work, fewer) * fewer
        assert memory_gib(work, 1) > BYTES_PER_PARAMETER * work.num_parameters / GIB
