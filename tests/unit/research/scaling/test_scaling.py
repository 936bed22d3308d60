"""Sizes of models, the tables of the documents, and the comparison with the measurements."""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen2ForSequenceClassification

from research.scaling.__main__ import main
from research.scaling.measured import Compared, compare, read_measurements
from research.scaling.plans import BATCH_COUPLED, Lengths, adapter_parameters, policy_shape, reward_model_shape
from research.scaling.shapes import SHAPES, shape_named, shape_of_config
from research.scaling.tables import MEASURED, RECIPES, TABLES, with_tables
from rm_robust.config.loading import load_config
from rm_robust.config.objectives import Objective
from rm_robust.config.training import LoraConfig, ModelConfig
from rm_robust.data.demonstrations import save_base_model
from rm_robust.errors import ConfigError
from rm_robust.models.lora import add_adapters
from rm_robust.models.policy import load_policy
from rm_robust.models.reward_model import new_reward_model
from rm_robust.training.reward_model.losses import SUMS_OVER_PAIRS
from tests.support.tiny_models import tiny_tokenizer

REPOSITORY = Path(__file__).parents[4]
PUBLISHED = {
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
}
"""The numbers of parameters in the checkpoints' safetensors files."""


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", SHAPES)
def test_a_known_model_has_its_published_number_of_parameters(name: str) -> None:
    assert SHAPES[name].policy_parameters == PUBLISHED[name]


@pytest.mark.parametrize("name", ["llama-3.1-8b", "qwen2.5-3b"])
def test_transformers_makes_a_known_model_as_large(name: str) -> None:
    shape = SHAPES[name]
    config_class, model_class = (
        (Qwen2Config, Qwen2ForCausalLM) if shape.has_qkv_bias else (LlamaConfig, LlamaForCausalLM)
    )
    config = config_class(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        tie_word_embeddings=shape.is_tied,
    )
    with torch.device("meta"):
        assert count(model_class(config)) == shape.policy_parameters


def test_a_model_from_scratch_has_the_parameters_of_its_shape_as_policy_and_as_reward_model(tmp_path: Path) -> None:
    config = ModelConfig(hidden_size=96, intermediate_size=160, num_layers=3, num_heads=3, num_kv_heads=1)
    tokenizer = tiny_tokenizer()
    save_base_model(tmp_path, config, tokenizer, seed=0)
    shape = shape_of_config(config, vocab_size=len(tokenizer))
    assert count(load_policy(tmp_path, dtype=torch.float32)) == shape.policy_parameters
    reward_model = new_reward_model(tmp_path, pad_id=0, seed=0)
    assert count(reward_model) == shape.reward_model_parameters
    read = shape_named(str(tmp_path))
    assert (read.policy_parameters, read.head_size, read.is_tied) == (shape.policy_parameters, 32, True)
    adapters = LoraConfig(rank=4)
    adapted = add_adapters(reward_model, adapters)
    assert sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad) == adapter_parameters(
        shape, adapters
    )


def test_an_untied_reward_model_has_no_output_head() -> None:
    config = Qwen2Config(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_labels=1,
    )
    shape = shape_of_config(
        ModelConfig(hidden_size=64, intermediate_size=96, num_layers=2, num_heads=2, num_kv_heads=2, vocab_size=512)
    )
    assert (
        count(Qwen2ForSequenceClassification(config)) == shape.reward_model_parameters == shape.policy_parameters + 64
    )


def test_the_last_part_of_a_path_names_a_model_and_an_unknown_one_is_refused() -> None:
    assert shape_named("/shared/models/llama-3.1-8b-instruct") is SHAPES["llama-3.1-8b"]
    with pytest.raises(ConfigError, match="none of"):
        shape_named("someone/else-7b")


def test_the_cache_of_llama_8b_takes_128_kib_a_token() -> None:
    assert SHAPES["llama-3.1-8b"].kv_cache_bytes_per_token(2) == 2 * 32 * 8 * 128 * 2 == 128 * 1024


def test_what_a_token_sees_is_counted_by_hand() -> None:
    """2 prompt tokens see 1 token on average, and 4 tokens in each of 2 completions see the prompt and 2 more.

    The mean is (2 x 1 + 8 x 4) / 10.
    """
    lengths = Lengths(2, 4)
    assert lengths.group_tokens(2) == 10
    assert lengths.visible(2) == pytest.approx(3.4)


def test_the_objectives_that_are_scored_before_are_those_that_are_no_sums_over_pairs() -> None:
    assert set(BATCH_COUPLED) == set(Objective) - set(SUMS_OVER_PAIRS)


@pytest.mark.parametrize("document", TABLES)
def test_the_documented_tables_are_what_the_formulas_give(document: str) -> None:
    text = (REPOSITORY / document).read_text()
    assert with_tables(document, text, REPOSITORY) == text


def test_every_recipe_that_has_a_row_names_a_model_of_known_size() -> None:
    for recipe in RECIPES:
        config = load_config(REPOSITORY / "pipelines" / "configs" / f"{recipe.name}.toml", [])
        assert config.model.path is not None
        assert reward_model_shape(config) == policy_shape(config) == shape_named(config.model.path)


def test_a_line_agrees_up_to_a_factor_of_two_either_way() -> None:
    assert [Compared("x", "s", predicted, 1.0).agrees for predicted in (0.49, 0.5, 2.0, 2.1)] == [
        False,
        True,
        True,
        False,
    ]


def test_every_measured_run_is_compared_and_agrees() -> None:
    """One file has the rates and runs of one machine, so only a formula or the file can change the outcome.

    `make check-scaling` does the same.
    """
    measurements = read_measurements(REPOSITORY / MEASURED)
    lines = compare(measurements, REPOSITORY)
    num_runs = len(measurements.training) + len(measurements.memory) + len(measurements.updates)
    assert len(lines) == num_runs >= 10
    assert [line for line in lines if not line.agrees] == []


def test_the_command_says_of_a_config_what_fits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(REPOSITORY)
    assert main(["--config", "pipelines/configs/full_rlhf.toml"]) == 2
    assert "checkpoints/sft" in capsys.readouterr().err
    assert main(["--config", "pipelines/configs/full_rlhf.toml", "--reward-model-base", "Qwen2.5-3B"]) == 0
    assert capsys.readouterr().out.count("fits") == 3
    assert main(["--config", "pipelines/configs/full_rlhf.toml", "--reward-model-base", "Llama-3.1-70B"]) == 0
    assert "DOES NOT FIT in 80 GiB" in capsys.readouterr().out


def test_check_fails_when_a_run_took_three_times_as_long(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fields = json.loads((REPOSITORY / MEASURED).read_text())
    (tmp_path / MEASURED).parent.mkdir(parents=True)
    (tmp_path / "pipelines").symlink_to(REPOSITORY / "pipelines")
    monkeypatch.chdir(tmp_path)
    measurements = read_measurements(REPOSITORY / MEASURED)
    runs = fields["training"] + fields["memory"] + fields["updates"]
    for run, line in zip(runs, compare(measurements, REPOSITORY), strict=True):
        run["measured"] = line.predicted
    (tmp_path / MEASURED).write_text(json.dumps(fields))
    assert main(["--check"]) == 0
    fields["training"][0]["measured"] *= 3
    (tmp_path / MEASURED).write_text(json.dumps(fields))
    assert main(["--check"]) == 1
