"""A config refuses what cannot work, and a partly given section keeps the defaults of the section around it."""

import tomllib
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel, ValidationError

from rm_robust.config.loading import load_config
from rm_robust.config.objectives import BsrScale, BsrScope, Objective
from rm_robust.config.rloo import RlooConfig
from rm_robust.config.run import PipelineConfig
from rm_robust.config.shared import OptimizerConfig, Section
from rm_robust.config.training import RewardModelConfig, SftConfig

CONFIGS = sorted(Path("pipelines/configs").glob("*.toml"))


def sections(model: type[BaseModel] = PipelineConfig) -> list[type[Section]]:
    """Return `model` and every section class below it."""
    classes: list[type[Section]] = [model] if issubclass(model, Section) else []
    for field in model.model_fields.values():
        kinds = [field.annotation, *get_args(field.annotation)]
        classes += [
            section
            for kind in kinds
            if isinstance(kind, type) and issubclass(kind, Section)
            for section in sections(kind)
        ]
    return list(dict.fromkeys(classes))


def parse(**values: Any) -> PipelineConfig:
    return PipelineConfig.model_validate({"name": "test", **values})


def problem_of(**values: Any) -> str:
    with pytest.raises(ValidationError) as refused:
        parse(**values)
    (problem,) = refused.value.errors()
    return ".".join(map(str, problem["loc"])) + ": " + problem["msg"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_of_the_repository_is_valid(path: Path) -> None:
    assert load_config(path, []).name


def test_there_are_configs_to_check() -> None:
    assert {"tiny_cpu.toml", "smoke.toml"} <= {path.name for path in CONFIGS}


def test_a_name_alone_is_a_whole_config() -> None:
    assert parse().reward_model.objective is Objective.BATCH_SUM_TO_ZERO
    assert parse().reward_model.bsr_scale is BsrScale.PAIRS
    assert parse().reward_model.bsr_coefficient == 1e-3


def test_a_partly_given_section_keeps_the_defaults_of_the_section_around_it() -> None:
    assert SftConfig().optimizer != OptimizerConfig()
    config = parse(sft={"optimizer": {"weight_decay": 0.1}}, rloo={"trainers": {"num_workers": 2}})
    assert config.sft.optimizer == SftConfig().optimizer.model_copy(update={"weight_decay": 0.1})
    assert config.rloo.trainers == RlooConfig().trainers.model_copy(update={"num_workers": 2})
    assert config.reward_model == RewardModelConfig()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"reward_model": {"objective": "hinge"}}, 'objective = "hinge" needs reward_model.margin > 0'),
        (
            {"reward_model": {"objective": "bt", "bsr_coefficient": 0.1}},
            'reward_model.bsr_coefficient = 0.1 is not read by objective = "bt"',
        ),
        ({"reward_model": {"objective": "bsr", "margin": 0.1}}, "reward_model.margin = 0.1 is not read"),
        ({"reward_model": {"bsr_scope": "micro"}}, "needs reward_model.bsr_micro_pairs"),
        ({"reward_model": {"bsr_micro_pairs": 4}}, 'read only with bsr_scope = "micro"'),
        ({"reward_model": {"preset": "released_code", "bsr_micro_pairs": 5}}, "must be a multiple"),
        (
            {"reward_model": {"preset": "released_code", "bsr_micro_pairs": 4, "bsr_scale": "none"}},
            'bsr_scale = "none"',
        ),
        (
            {"reward_model": {"preset": "released_code", "bsr_micro_pairs": 4, "bsr_scope": "step"}},
            'bsr_scope = "step"',
        ),
        ({"reward_model": {"strategy": {"cpu_offload": True}}}, "needs something sharded"),
    ],
)
def test_settings_of_an_objective_that_do_not_fit_are_refused(values: dict[str, Any], expected: str) -> None:
    assert expected in problem_of(**values)


def test_the_preset_is_the_released_codes_scope_and_scale() -> None:
    settings = parse(reward_model={"preset": "released_code", "bsr_micro_pairs": 16}).reward_model
    assert (settings.bsr_scope, settings.bsr_scale, settings.bsr_micro_pairs) == (BsrScope.MICRO, BsrScale.PAIRS, 16)


def test_the_resolved_config_parses_to_itself() -> None:
    for path in CONFIGS:
        config = load_config(path, [])
        assert PipelineConfig.model_validate_json(config.model_dump_json()) == config


def test_every_section_is_frozen_and_refuses_unknown_keys() -> None:
    assert len(sections()) > 10
    for section in sections():
        assert section.model_config["frozen"], section
        assert section.model_config["extra"] == "forbid", section
    with pytest.raises(ValidationError, match="frozen"):
        parse().rloo.__setattr__("num_steps", 3)


@pytest.mark.parametrize(
    "path", [("typo",), ("sft", "typo"), ("sft", "optimizer", "typo"), ("serve", "gold_replica", "typo")]
)
def test_an_unknown_key_is_refused_at_any_depth(path: tuple[str, ...]) -> None:
    values: Any = 1
    for name in reversed(path):
        values = {name: values}
    assert problem_of(**values).startswith(".".join(path) + ": Extra inputs are not permitted")


def test_a_single_completion_per_prompt_is_refused_with_the_fix() -> None:
    problem = problem_of(rloo={"num_completions_per_prompt": 1})
    assert problem.startswith("rloo.num_completions_per_prompt: ")
    assert "got 1. Set rloo.num_completions_per_prompt >= 2" in problem


@pytest.mark.parametrize(
    ("values", "setting"),
    [
        ({"seed": -1}, "seed"),
        ({"name": "a/b"}, "name"),
        ({"name": ".."}, "name"),
        ({"sft": {"optimizer": {"learning_rate": 0.0}}}, "sft.optimizer.learning_rate"),
        ({"sft": {"optimizer": {"learning_rate": 2e5}}}, "sft.optimizer.learning_rate"),
        ({"sft": {"optimizer": {"schedule": "square"}}}, "sft.optimizer.schedule"),
        ({"reward_model": {"objective": "hinges"}}, "reward_model.objective"),
        ({"reward_model": {"bsr_coefficient": float("inf")}}, "reward_model.bsr_coefficient"),
        ({"reward_model": {"strategy": {"kind": "deepspeed", "zero_stage": 4}}}, "reward_model.strategy.zero_stage"),
        ({"rloo": {"temperature": 0}}, "rloo.temperature"),
        ({"data": {"max_dropped_fraction": 1.5}}, "data.max_dropped_fraction"),
        ({"data": {"overlong": "truncate"}}, "data.overlong"),
        ({"serve": {"request_timeout_s": 0}}, "serve.request_timeout_s"),
    ],
)
def test_a_value_out_of_its_bounds_is_refused_by_its_path(values: dict[str, Any], setting: str) -> None:
    assert problem_of(**values).startswith(f"{setting}: ")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sft": {"batch_size": 1}}, "sft.batch_size = 1 leaves some of sft.workers.num_workers = 2"),
        ({"reward_model": {"batch_size": 3, "workers": {"num_workers": 4}}}, "reward_model.batch_size = 3 leaves some"),
        (
            {"rloo": {"num_prompts_per_step": 3, "trainers": {"num_workers": 2}}},
            "must be a multiple of num_minibatches_per_epoch * trainers.num_workers = 2",
        ),
        ({"rloo": {"weight_transfer_backend": "nccl"}}, "needs GPUs on both sides"),
        ({"rloo": {"reward_sources": [{"name": "rule"}]}}, "set either url or function"),
        ({"rloo": {"reward_sources": [{"name": "gold", "url": "http://127.0.0.1:1"}]}}, "may not be called 'gold'"),
        ({"model": {"hidden_size": 100, "num_heads": 5}}, "must be a multiple of 32 per head"),
        (
            {"model": {"hidden_size": 128, "num_heads": 4, "num_kv_heads": 3}},
            "must be a multiple of model.num_kv_heads = 3",
        ),
        ({"data": {"max_prompt_tokens": 200}}, "exceeds model.max_position_embeddings = 256"),
        ({"sft": {"enabled": False}}, "sft.enabled = false needs model.path"),
        (
            {"data": {"source": "responses", "responses": ["a.jsonl"]}},
            'data.source = "responses" needs data.unseen_models',
        ),
        ({"data": {"source": "scenarios"}}, "needs data.train and data.in_domain"),
    ],
)
def test_an_impossible_combination_is_refused_with_both_values(values: dict[str, Any], message: str) -> None:
    assert message in problem_of(**values)


FILES = {
    "source": "scenarios",
    "train": ["t.jsonl"],
    "in_domain": ["i.jsonl"],
    "sft": ["s.jsonl"],
    "rloo_prompts": ["p.jsonl"],
}


def test_own_data_needs_its_own_judge_demonstrations_and_prompts() -> None:
    assert parse(data=FILES, serve={"gold": "judge"}).data.source == "scenarios"
    assert "judges only the embedded world" in problem_of(data=FILES)
    assert "needs data.sft" in problem_of(data={**FILES, "sft": []}, serve={"gold": "judge"})


def test_all_that_does_not_fit_together_is_said_at_once() -> None:
    own = {**FILES, "sft": [], "max_prompt_tokens": 512, "max_completion_tokens": 512}
    message = problem_of(data=own)
    assert "set model.max_position_embeddings = 1024" in message
    assert "needs data.sft, which is empty; name demonstrations, or pairs" in message
    assert "judges only the embedded world" in message


def test_training_sources_are_paths_or_tables_with_a_weight() -> None:
    toml = 'train = ["a.jsonl", { path = "s3://bucket/b", weight = 2.0 }, { path = "c.jsonl" }]'
    config = parse(data={**FILES, **tomllib.loads(toml)}, serve={"gold": "judge"})
    assert [(entry.path, entry.weight) for entry in config.data.train] == [
        ("a.jsonl", 1.0),
        ("s3://bucket/b", 2.0),
        ("c.jsonl", 1.0),
    ]
    assert PipelineConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ({"path": "a.jsonl", "weight": 0}, "data.train.0.weight: Input should be greater than 0"),
        ({"path": "a.jsonl", "weight": -1.0}, "data.train.0.weight: Input should be greater than 0"),
        ({"path": "a.jsonl", "weight": float("inf")}, "data.train.0.weight: Input should be a finite number"),
        ({"path": "a.jsonl", "wieght": 2.0}, "data.train.0.wieght: Extra inputs are not permitted"),
        ({"weight": 2.0}, "data.train.0.path: Field required"),
        ("", "data.train.0.path: String should have at least 1 character"),
        (5, "data.train.0: Input should be a valid dictionary or instance of WeightedPath"),
    ],
)
def test_a_training_source_that_is_no_weighted_path_is_refused_by_its_place(entry: object, problem: str) -> None:
    assert problem_of(data={**FILES, "train": [entry]}, serve={"gold": "judge"}).startswith(problem)


def test_every_section_says_what_it_is() -> None:
    assert all(section.__doc__ for section in sections())


def test_toml_floats_in_scientific_notation_are_numbers() -> None:
    values = tomllib.loads("[sft.optimizer]\nlearning_rate = 1e-3")
    assert parse(**values).sft.optimizer.learning_rate == 0.001


def test_a_bt_twin_differs_in_the_objective_and_what_the_other_objective_reads() -> None:
    settings = RewardModelConfig(
        preset="released_code", bsr_micro_pairs=8, bsr_coefficient=0.5, batch_size=32, num_epochs=2.0, bt_twin=True
    )
    twin = settings.as_bt_twin()
    assert (twin.objective, twin.batch_size, twin.num_epochs, twin.bt_twin) == (Objective.BRADLEY_TERRY, 32, 2.0, False)
    assert twin == RewardModelConfig(objective=Objective.BRADLEY_TERRY, batch_size=32, num_epochs=2.0)


def test_a_bradley_terry_model_has_no_bradley_terry_twin() -> None:
    with pytest.raises(ValidationError, match="train the same model twice"):
        RewardModelConfig(objective=Objective.BRADLEY_TERRY, bt_twin=True)
