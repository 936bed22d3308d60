"""What would fail hours later is refused before any work, and only where a stage that is run needs it."""

from pathlib import Path
from typing import Any

import pytest

from pipelines.checks import check_inputs, refuse_glob_characters
from pipelines.stages import EVALUATION, PREFERENCES, REWARD_MODEL, RLOO, SFT, Stage
from rm_robust.config.run import PipelineConfig
from rm_robust.errors import ConfigError, DataError, RmRobustError
from rm_robust.runs.directory import Run
from tests.support.tiny_models import save_tiny_language_model

REWARD_MODEL_STAGES = (PREFERENCES, REWARD_MODEL, EVALUATION)
PAIR = '{"prompt": "Which is first?", "chosen": "red", "rejected": "blue"}\n'


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_language_model(tmp_path_factory.mktemp("models") / "tiny", num_positions=128)


def run_of(tmp_path: Path, start: Path, **sections: dict[str, Any]) -> Run:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(PAIR * 3)
    data = {
        "source": "scenarios",
        "train": [str(pairs)],
        "in_domain": [str(pairs)],
        "max_prompt_tokens": 64,
        "max_completion_tokens": 64,
        **sections.pop("data", {}),
    }
    values = {"name": "x", "data": data, "sft": {"enabled": False}, "model": {"path": str(start)}, **sections}
    return Run(PipelineConfig.model_validate(values), tmp_path / "run")


def test_a_run_that_fits_passes(tmp_path: Path, model: Path) -> None:
    check_inputs(run_of(tmp_path, model), REWARD_MODEL_STAGES)


def test_served_lengths_do_not_concern_a_run_that_serves_nothing(tmp_path: Path, model: Path) -> None:
    run = run_of(tmp_path, model, serve={"proxy_replica": {"max_length_tokens": 40}})
    check_inputs(run, REWARD_MODEL_STAGES)


@pytest.mark.parametrize(
    ("sections", "stages", "message"),
    [
        (
            {"data": {"max_completion_tokens": 65}},
            REWARD_MODEL_STAGES,
            r"data.max_prompt_tokens \+ data.max_completion_tokens = 129 exceeds the 128 positions of model.path = ",
        ),
        ({"model": {"path": "./nowhere"}}, REWARD_MODEL_STAGES, "model.path = ./nowhere: there is no such directory"),
        (
            {"reward_model": {"base_path": "./nowhere"}},
            REWARD_MODEL_STAGES,
            "reward_model.base_path = ./nowhere: there is no such directory",
        ),
        (
            {"reward_model": {"lora": {"target_modules": ["q_proj", "c_attn"]}}},
            REWARD_MODEL_STAGES,
            "reward_model.lora.target_modules: c_attn names no linear layer of model.path = ",
        ),
        ({}, (*REWARD_MODEL_STAGES, RLOO), "data.rloo_prompts is empty; name the prompts"),
    ],
)
def test_what_would_fail_late_is_refused_at_the_start(
    tmp_path: Path, model: Path, sections: dict[str, Any], stages: tuple[Stage, ...], message: str
) -> None:
    with pytest.raises((ConfigError, DataError), match=message) as error:
        check_inputs(run_of(tmp_path, model, **sections), stages)
    assert "\n" not in str(error.value)


def test_rloo_that_could_sample_what_its_scorers_refuse_is_refused(tmp_path: Path) -> None:
    run = Run(PipelineConfig.model_validate({"name": "x", "rloo": {"max_new_tokens": 200}}), tmp_path / "run")
    with pytest.raises(RmRobustError, match="RLOO could sample completions that the scorer refuses"):
        check_inputs(run, (SFT, *REWARD_MODEL_STAGES, RLOO))


@pytest.mark.parametrize(
    ("stages", "needed", "command"),
    [
        ((PREFERENCES,), "sft", "train-sft"),
        ((REWARD_MODEL,), "sft", "train-sft"),
        ((EVALUATION,), "preferences", "prepare-preferences"),
        ((RLOO,), "sft", "train-sft"),
    ],
)
def test_a_stage_out_of_order_names_the_command_to_run_first(
    tmp_path: Path, stages: tuple[Stage, ...], needed: str, command: str
) -> None:
    run = Run(PipelineConfig(name="x"), tmp_path / "run")
    with pytest.raises(ConfigError, match=rf"needs the result of stage {needed}, .*Run `rm-robust {command}`"):
        check_inputs(run, stages)


@pytest.mark.parametrize("character", "[]*?")
def test_glob_characters_in_a_run_directory_are_refused(character: str) -> None:
    with pytest.raises(ConfigError, match="which vLLM takes for a pattern"):
        refuse_glob_characters(Path(f"runs/a{character}b"), "--run-dir")
    refuse_glob_characters(Path("runs/a b-c"), "--run-dir")
