"""Check which files a config names, and that a missing one is refused without a cluster."""

import json
from pathlib import Path
from typing import Any

import pytest

from rm_robust.config.data import Overlong
from rm_robust.config.run import PipelineConfig
from rm_robust.data.pipeline import DataSource
from rm_robust.data.preferences import (
    check_preference_sources,
    preference_sources,
    rloo_prompt_source,
    token_limits,
)
from rm_robust.data.rows import RowKind
from rm_robust.errors import DataError
from rm_robust.runs.layout import RunLayout


def config_of(**data: Any) -> PipelineConfig:
    values: dict[str, Any] = {"name": "test", "data": data}
    if data.get("source", "embedded") != "embedded":
        values |= {
            "serve": {"gold": "judge"},
            "data": {"sft": ["sft.jsonl"], "rloo_prompts": ["prompts.jsonl"], **data},
        }
    return PipelineConfig.model_validate(values)


LAYOUT = RunLayout(Path("/runs/test"))


def test_scenarios_that_the_run_builds_are_ranked_rows_of_its_own() -> None:
    for config in (config_of(), config_of(source="responses", responses=["r.jsonl"], unseen_models=["m"])):
        sources = preference_sources(config, LAYOUT)
        assert [source.scenario for source in sources] == [
            "train",
            "in_domain",
            "prompt_disjoint",
            "response_disjoint",
            "mutual_disjoint",
        ]
        assert sources[1] == DataSource(
            "in_domain", ("/runs/test/preferences/scenarios/in_domain.jsonl",), RowKind.RANKED
        )


def test_ready_made_scenarios_are_the_users_files_and_only_those_that_there_are() -> None:
    train = ["a.jsonl", {"path": "s3://bucket/b.parquet", "weight": 2.0}]
    config = config_of(source="scenarios", train=train, in_domain=["i.jsonl", "j.jsonl"], mutual_disjoint=["m.jsonl"])
    assert preference_sources(config, LAYOUT) == [
        DataSource("train", ("a.jsonl",), RowKind.TRAINING_PAIRS, 1.0),
        DataSource("train", ("s3://bucket/b.parquet",), RowKind.TRAINING_PAIRS, 2.0),
        DataSource("in_domain", ("i.jsonl", "j.jsonl"), None),
        DataSource("mutual_disjoint", ("m.jsonl",), None),
    ]


def test_prompts_for_rloo_come_from_the_world_or_from_the_user() -> None:
    user_data = {"source": "scenarios", "train": ["t"], "in_domain": ["i"]}
    assert rloo_prompt_source(config_of(), LAYOUT) == DataSource(
        "rloo_prompts", ("/runs/test/world/rloo_prompts.jsonl",), RowKind.PROMPT
    )
    assert rloo_prompt_source(config_of(**user_data), LAYOUT) == DataSource(
        "rloo_prompts", ("prompts.jsonl",), RowKind.PROMPT
    )
    assert rloo_prompt_source(config_of(**user_data, rloo_prompts=[]), LAYOUT) is None


def test_the_reward_model_grows_from_the_sft_model_unless_told_otherwise() -> None:
    assert LAYOUT.reward_model_base_dir(config_of()) == "/runs/test/checkpoints/sft"
    other = PipelineConfig.model_validate({"name": "test", "reward_model": {"base_path": "my/model"}})
    assert LAYOUT.reward_model_base_dir(other) == "/runs/test/models/my--model"


def test_limits_are_the_configs() -> None:
    limits = token_limits(
        config_of(
            max_prompt_tokens=50, max_completion_tokens=40, max_dropped_fraction=0.5, overlong="truncate_prompt_left"
        )
    )
    assert (limits.max_prompt_tokens, limits.max_completion_tokens, limits.max_dropped_fraction) == (50, 40, 0.5)
    assert limits.overlong is Overlong.TRUNCATE_PROMPT_LEFT
    assert token_limits(config_of()).overlong is Overlong.DROP


@pytest.mark.parametrize("missing", ["train", "in_domain", "mutual_disjoint", "sft", "rloo_prompts"])
def test_any_missing_file_of_the_user_is_refused_by_path(tmp_path: Path, missing: str) -> None:
    files = {
        name: tmp_path / f"{name}.jsonl" for name in ("train", "in_domain", "mutual_disjoint", "sft", "rloo_prompts")
    }
    config = config_of(source="scenarios", **{name: [str(path)] for name, path in files.items()})
    for path in files.values():
        path.write_text(json.dumps({"prompt": "x"}) + "\n")
    check_preference_sources(config, tmp_path)
    files[missing].unlink()
    with pytest.raises(DataError, match=f"no file or folder at {files[missing]}"):
        check_preference_sources(config, tmp_path)


def test_missing_responses_are_refused_by_path_and_the_embedded_world_needs_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"no file or folder at {tmp_path}/r.jsonl"):
        check_preference_sources(
            config_of(source="responses", responses=[str(tmp_path / "r.jsonl")], unseen_models=["m"]), tmp_path
        )
    check_preference_sources(config_of(), tmp_path)
