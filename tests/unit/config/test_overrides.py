"""Settings are options of the command line. An option that names no setting is refused, with the nearest ones."""

import argparse
from pathlib import Path

import pytest

from rm_robust.config.loading import load_config, overrides_of
from rm_robust.config.run import PipelineConfig
from rm_robust.errors import ConfigError
from rm_robust.responses.config import ResponsesConfig


def refusal(*arguments: str) -> str:
    with pytest.raises(ConfigError) as refused:
        overrides_of(arguments, PipelineConfig)
    return str(refused.value)


def test_a_setting_is_an_option_with_or_without_an_equals_sign_at_any_depth() -> None:
    arguments = ["--rloo.num_steps", "200", "--sft.optimizer.learning_rate=1e-3", "--seed", "3", "--name=a=b"]
    assert overrides_of(arguments, PipelineConfig) == [
        "rloo.num_steps=200",
        "sft.optimizer.learning_rate=1e-3",
        "seed=3",
        "name=a=b",
    ]


def test_a_negative_number_is_a_value() -> None:
    assert overrides_of(["--rloo.proxy_weight", "-1e-3"], PipelineConfig) == ["rloo.proxy_weight=-1e-3"]


def test_the_last_of_several_wins_also_between_set_and_options(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('name = "a"\n[rloo]\nnum_steps = 1\n')
    option, override = ["--rloo.num_steps", "2"], ["--set", "rloo.num_steps=3"]
    for arguments, num_steps in (
        (option + override, 3),
        (override + option, 2),
        ([*option, "--set=rloo.num_steps=4"], 4),
    ):
        overrides = overrides_of(arguments, PipelineConfig)
        assert load_config(tmp_path / "a.toml", overrides).rloo.num_steps == num_steps


def test_values_have_the_types_of_toml(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('name = "a"\n')
    arguments = [
        *("--reward_model.objective", "hinge", "--reward_model.margin", "0.5", "--reward_model.bt_twin", "true"),
        *("--reward_model.lora.rank", "4", "--sft.strategy", '{ kind = "fsdp2" }', "--model.path", "some/dir"),
        *("--data.task_resources.data", "0.5", "--reward_model.evaluation_sets", '["prompt_disjoint"]'),
    ]
    config = load_config(tmp_path / "a.toml", overrides_of(arguments, PipelineConfig))
    assert (config.reward_model.objective, config.reward_model.margin, config.reward_model.bt_twin) == (
        "hinge",
        0.5,
        True,
    )
    assert config.reward_model.lora is not None
    assert (config.reward_model.lora.rank, config.reward_model.lora.alpha) == (4, 32)
    assert (config.sft.strategy.kind, config.model.path) == ("fsdp2", "some/dir")
    assert (config.data.task_resources, config.reward_model.evaluation_sets) == ({"data": 0.5}, ("prompt_disjoint",))


def test_what_argparse_leaves_over_becomes_overrides() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--config")
    parser.add_argument("--seed")
    arguments = [
        "--rloo.num_steps",
        "9",
        "--config",
        "a.toml",
        "--seed",
        "1",
        "--set",
        "name=b",
        "--rloo.temperature=0.7",
    ]
    options, left_over = parser.parse_known_args(arguments)
    assert (options.config, options.seed) == ("a.toml", "1"), "an option of the command goes before a setting"
    assert overrides_of(left_over, PipelineConfig) == ["rloo.num_steps=9", "name=b", "rloo.temperature=0.7"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--rlo.num_steps", "3"],
            "--rlo.num_steps is neither an option nor a setting. The nearest is --rloo.num_steps. ",
        ),
        (["--sede=3"], "The nearest is --seed. `rm-robust settings` lists the settings, --help the options."),
        (
            ["--rloo.qqq=3"],
            "--rloo.qqq is neither an option nor a setting. `rm-robust settings rloo` lists the settings",
        ),
        (
            ["--rloo.num_steps"],
            "--rloo.num_steps has no value. Give it as --rloo.num_steps VALUE or --rloo.num_steps=VALUE.",
        ),
        (["--reward_model.bt_twin", "--seed", "3"], "--reward_model.bt_twin has no value."),
        (["--set"], "--set has no value."),
        (["rloo.num_steps=3"], "'rloo.num_steps=3' belongs to no option. Give a setting as --seed 3 or --seed=3"),
        (["--seed", "3", "4"], "'4' belongs to no option."),
        (["-s", "3"], "'-s' belongs to no option."),
    ],
)
def test_a_wrong_option_is_refused_in_one_line(arguments: list[str], message: str) -> None:
    refused = refusal(*arguments)
    assert message in refused
    assert "\n" not in refused


def test_the_settings_are_those_of_the_commands_own_config() -> None:
    assert overrides_of(["--sampling.top_p", "0.9"], ResponsesConfig) == ["sampling.top_p=0.9"]
    with pytest.raises(ConfigError, match=r"--rloo.num_steps is neither .* docs/reference/settings.md lists"):
        overrides_of(["--rloo.num_steps", "3"], ResponsesConfig)
