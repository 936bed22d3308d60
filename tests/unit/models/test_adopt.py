"""A model from elsewhere becomes a checkpoint with unchanged files, which scores as it did there.

A model that cannot become one is refused, and nothing is written.
"""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from pipelines.command import main
from rm_robust.config.training import LoraConfig
from rm_robust.data.records import TokenGroup
from rm_robust.errors import ChatTemplateError, CheckpointError, RmRobustError
from rm_robust.models.adopt import adopt
from rm_robust.models.checkpoint import MANIFEST_NAME, verify_checkpoint
from rm_robust.models.lora import add_adapters
from rm_robust.models.scorer import RewardScorer
from tests.support.tiny_armorm import save_tiny_armorm, tiny_armorm_weights
from tests.support.tiny_models import tiny_reward_model, tiny_tokenizer
from tests.unit.data.test_chat import LLAMA_TEMPLATE, llama
from tests.unit.models.test_armorm import published_score

PROMPT, COMPLETIONS = "red, green or blue?", ["blue", "seven apples, please"]


def scores_of(checkpoint_dir: Path) -> list[float]:
    scorer = RewardScorer.load(checkpoint_dir, device="cpu", dtype="float32", max_length_tokens=128)
    group = TokenGroup(scorer.chat.prompt_ids(PROMPT), [scorer.chat.completion_ids(text) for text in COMPLETIONS])
    return scorer.score_groups([group])[0]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != MANIFEST_NAME
    }


def save_one_score(folder: Path, *, template: str, **config: object) -> Path:
    """Save a reward model as other trainers do."""
    model = tiny_reward_model()
    model.config.pad_token_id = None
    model.save_pretrained(folder)
    tokenizer = copy.deepcopy(llama().tokenizer)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder


def test_an_adopted_armorm_scores_as_its_published_code(tmp_path: Path) -> None:
    source, target = (
        save_tiny_armorm(tmp_path / "source", weights=tiny_armorm_weights(), num_files=2),
        tmp_path / "target",
    )
    before = contents(source)
    manifest = adopt(source, target)
    assert contents(target) == contents(source) == before
    assert verify_checkpoint(target, "reward_model") == manifest
    assert (manifest.training, manifest.template_sha256) == ({"adopted_from": str(source)}, llama().template_sha256)
    chat = llama()
    assert scores_of(target) == pytest.approx(
        [published_score(chat.prompt_ids(PROMPT) + chat.completion_ids(text)) for text in COMPLETIONS], abs=1e-5
    )


def test_an_adopted_model_with_one_score_scores_as_transformers(tmp_path: Path) -> None:
    adopt(save_one_score(tmp_path / "source", template=LLAMA_TEMPLATE), tmp_path / "target")
    chat = llama()
    with torch.inference_mode():
        expected = [
            tiny_reward_model()(
                input_ids=torch.tensor([chat.prompt_ids(PROMPT) + chat.completion_ids(text)])
            ).logits.item()
            for text in COMPLETIONS
        ]
    assert scores_of(tmp_path / "target") == pytest.approx(expected, abs=1e-4)


FOREIGN: dict[str, dict[str, Any]] = {
    "gpt_neox": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128},
    "gemma3_text": {"head_dim": 16, "num_key_value_heads": 1},
    "gemma3": {
        "text_config": {
            "vocab_size": 330,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "head_dim": 16,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "intermediate_size": 64,
            "max_position_embeddings": 128,
        },
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
    },
    "bert": {},
}


def save_foreign(folder: Path, model_type: str) -> PreTrainedModel:
    """Save a random classifier with one score of a family that we do not make."""
    sizes = {
        "vocab_size": 330,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 128,
    }
    own = FOREIGN[model_type]
    config = AutoConfig.for_model(model_type, **({} if "text_config" in own else sizes), **own, num_labels=1)
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config).eval()
    model.save_pretrained(folder)
    tokenizer = copy.deepcopy(llama().tokenizer)
    tokenizer.chat_template = LLAMA_TEMPLATE
    tokenizer.save_pretrained(folder)
    return model


@pytest.mark.parametrize("model_type", ["gpt_neox", "gpt2", "gemma3_text", "gemma3"])
def test_an_adopted_model_of_another_family_scores_as_transformers(tmp_path: Path, model_type: str) -> None:
    model = save_foreign(tmp_path / "source", model_type)
    adopt(tmp_path / "source", tmp_path / "target")
    chat = llama()
    with torch.inference_mode():
        expected = [
            model(input_ids=torch.tensor([chat.prompt_ids(PROMPT) + chat.completion_ids(text)])).logits.item()
            for text in COMPLETIONS
        ]
    assert scores_of(tmp_path / "target") == pytest.approx(expected, abs=1e-4)


def test_an_encoder_is_refused_in_one_line_and_nothing_is_written(tmp_path: Path) -> None:
    save_foreign(tmp_path / "source", "bert")
    with pytest.raises(CheckpointError, match="BertForSequenceClassification has the head None; only one bias-free"):
        adopt(tmp_path / "source", tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_what_training_left_beside_a_model_is_left_out_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = save_one_score(tmp_path / "source", template=LLAMA_TEMPLATE)
    for name in ("training_args.bin", "optimizer.pt", "rng_state_0.pth"):
        (source / name).write_bytes(b"pickled")
    with caplog.at_level("WARNING"):
        adopt(source, tmp_path / "target")
    assert not [path for path in (tmp_path / "target").iterdir() if path.suffix in (".bin", ".pt", ".pth")]
    for name in ("training_args.bin", "optimizer.pt", "rng_state_0.pth"):
        assert f"{name} is left out" in caplog.text


def test_serving_a_hugging_face_directory_names_the_command_that_adopts_it(tmp_path: Path) -> None:
    source = save_one_score(tmp_path / "source", template=LLAMA_TEMPLATE)
    with pytest.raises(CheckpointError, match=rf"`rm-robust adopt {source} NEW_DIRECTORY`"):
        scores_of(source)


def test_a_folder_of_the_hubs_cache_is_adopted_without_its_links_and_hidden_files(tmp_path: Path) -> None:
    blobs, snapshot = save_tiny_armorm(tmp_path / "blobs"), tmp_path / "snapshot"
    snapshot.mkdir()
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(path)
    (snapshot / ".cache").mkdir()
    (snapshot / ".cache" / "pytorch_model.bin").write_text("")
    adopt(snapshot, tmp_path / "target")
    assert contents(tmp_path / "target") == contents(blobs)
    assert not any(path.is_symlink() for path in (tmp_path / "target").iterdir())


def test_the_command_prints_the_identity_that_is_served(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = save_tiny_armorm(tmp_path / "source"), tmp_path / "target"
    assert main(["adopt", str(source), str(target)]) == 0
    assert (
        RewardScorer.load(target, device="cpu", dtype="float32", max_length_tokens=64).checkpoint_id
        in capsys.readouterr().out
    )
    assert main(["adopt", str(source), str(target)]) == 1
    assert f"error: {target} exists already" in capsys.readouterr().err


def test_inside_a_ray_job_a_relative_target_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert main(["adopt", str(save_tiny_armorm(tmp_path / "source")), "target"]) == 1
    assert "TARGET target is relative" in capsys.readouterr().err
    assert not (tmp_path / "target").exists()


def refusal(source: Path, kind: type[RmRobustError] = CheckpointError) -> str:
    target = source.parent / "target"
    with pytest.raises(kind) as refused:
        adopt(source, target)
    assert [path.name for path in source.parent.iterdir() if "target" in path.name] == []
    return str(refused.value)


def test_what_is_no_model_directory_or_is_adopted_already_is_refused(tmp_path: Path) -> None:
    assert "There is no" in refusal(tmp_path / "nowhere")
    source = save_tiny_armorm(tmp_path / "a" / "source")
    adopt(source, tmp_path / "b" / "adopted")
    assert "is a checkpoint of rm_robust already" in refusal(tmp_path / "b" / "adopted")
    (source / "config.json").write_text("{")
    assert "config.json is not JSON" in refusal(source)


def test_a_template_that_goes_on_after_the_end_of_turn_is_refused(tmp_path: Path) -> None:
    """transformers reads such a model's score at the newline after the end of turn."""
    message = refusal(
        save_one_score(tmp_path / "source", template=LLAMA_TEMPLATE.replace("'<|eot_id|>' }}", "'<|eot_id|>\\n' }}"))
    )
    assert "writes '\\n' after the last '<|eot_id|>'. Other programs read the score after that text" in message


def test_a_pad_token_that_conversations_hold_is_refused(tmp_path: Path) -> None:
    message = refusal(save_tiny_armorm(tmp_path / "source", config={"pad_token_id": llama().end_of_turn_id}))
    assert (
        f"has pad_token_id = {llama().end_of_turn_id}, '<|eot_id|>', "
        "which the chat template writes into every conversation" in message
    )


def test_a_tokenizer_without_a_template_or_with_code_is_refused(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    assert "has no chat template" in refusal(
        save_tiny_armorm(tmp_path / "a" / "source", tokenizer=tokenizer), ChatTemplateError
    )
    source = save_tiny_armorm(tmp_path / "b" / "source")
    config = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(
        json.dumps({**config, "auto_map": {"AutoTokenizer": [None, "tokenization_x.X"]}})
    )
    assert "brings its own code, which is never run here" in refusal(source)


def test_a_model_that_does_not_load_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    weights = tiny_armorm_weights()
    del weights["reward_transform_matrix"]
    assert "1 missing: reward_transform_matrix" in refusal(save_tiny_armorm(tmp_path / "a" / "source", weights=weights))
    assert "num_labels=2" in refusal(
        save_one_score(tmp_path / "b" / "source", template=LLAMA_TEMPLATE, id2label={"0": "a", "1": "b"})
    )


@pytest.mark.parametrize(
    "elsewhere",
    ["../other/model.safetensors", "{tmp_path}/other/model.safetensors", ".hidden/model.safetensors", "weights.data"],
)
@pytest.mark.parametrize("kind", ["one score", "ArmoRM"])
def test_an_index_that_names_weights_elsewhere_is_refused(tmp_path: Path, kind: str, elsewhere: str) -> None:
    source, elsewhere = tmp_path / "source", elsewhere.format(tmp_path=tmp_path)
    if kind == "one score":
        save_one_score(source, template=LLAMA_TEMPLATE)
    else:
        save_tiny_armorm(source, weights=tiny_armorm_weights())
    weights = source / "model.safetensors"
    names = list(load_file(weights))
    (source / elsewhere).parent.mkdir(exist_ok=True)
    weights.rename(source / elsewhere)
    (source / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, elsewhere)})
    )
    assert f"index.json names weights that are not safetensors files of this directory: {elsewhere}." in refusal(source)


def test_an_adapter_whose_base_lies_elsewhere_is_refused(tmp_path: Path) -> None:
    """transformers would read the base and ignore the weights beside the adapter."""
    source, base = save_one_score(tmp_path / "source", template=LLAMA_TEMPLATE), tmp_path / "base"
    tiny_reward_model().save_pretrained(base)
    adapted = add_adapters(tiny_reward_model(), LoraConfig(rank=1))
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(source)
    assert "holds an adapter (adapter_config.json), not a whole model" in refusal(source)
