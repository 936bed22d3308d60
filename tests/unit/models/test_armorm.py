"""ArmoRM's scores are those of its published code, one conversation at a time.

A directory that differs from the published one is refused, with the name of what differs.
"""

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaModel

from rm_robust.data.chat import ChatFormat
from rm_robust.data.records import Message, TokenGroup
from rm_robust.errors import CheckpointError, ScoringError
from rm_robust.models.architectures import load_packed_reward_model
from rm_robust.models.armorm import PackedArmoRM
from rm_robust.models.packing import Layout, lay_out
from tests.support.tiny_armorm import CONFIG, save_tiny_armorm, tiny_armorm_weights
from tests.support.tiny_models import random_group, tiny_reward_model, tiny_tokenizer
from tests.unit.data.test_chat import LLAMA_TEMPLATE, llama

WORDS = ["red", "green", "blue", "seven", "apples", "river", "please", "answer"]
CPU = torch.device("cpu")


def text(rng: Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(1, 12)))


def conversation(rng: Random) -> list[Message]:
    """One to three user turns, with a system turn half the time."""
    system: list[Message] = [{"role": "system", "content": text(rng)}] if rng.random() < 0.5 else []
    turns: list[Message] = [
        {"role": role, "content": text(rng)} for _ in range(rng.randint(0, 2)) for role in ("user", "assistant")
    ]
    return [*system, *turns, {"role": "user", "content": text(rng)}]


def groups(num_groups: int = 7) -> list[TokenGroup]:
    rng = Random(1)
    return [
        TokenGroup(llama().prompt_ids(conversation(rng)), [llama().completion_ids(text(rng)) for _ in range(1 + i % 4)])
        for i in range(num_groups)
    ]


@functools.cache
def weights() -> dict[str, Tensor]:
    return tiny_armorm_weights()


@functools.cache
def published_decoder() -> LlamaModel:
    decoder = LlamaModel(LlamaConfig.from_dict({**CONFIG, "attn_implementation": "eager"}))
    decoder.load_state_dict(
        {name.removeprefix("model."): weight for name, weight in weights().items() if name.startswith("model.")}
    )
    decoder.double().eval()
    return decoder


@torch.no_grad()
def published_score(ids: list[int], gate_at: Callable[[list[int]], int] | None = None) -> float:
    """Score one conversation as modeling_custom.py does, in float64 and without any class of rm_robust."""
    w = {name: weight.double() for name, weight in weights().items()}
    hidden_TH = published_decoder()(input_ids=torch.tensor([ids])).last_hidden_state[0]
    last = (torch.eq(torch.tensor(ids), CONFIG["pad_token_id"]).int().argmax().item() - 1) % len(ids)  # type: ignore[call-overload]
    rewards = w["regression_layer.weight"] @ hidden_TH[last]
    pattern = llama().tokenizer.encode(
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n", add_special_tokens=False
    )
    header_start = next(j for j in range(len(ids) - len(pattern), -1, -1) if ids[j : j + len(pattern)] == pattern)
    x = hidden_TH[gate_at(ids) if gate_at else header_start]
    for i in range(3):
        x = F.relu(w[f"gating.layers.{i}.weight"] @ x + w[f"gating.layers.{i}.bias"])
    gate = (
        F.softmax((w["gating.layers.3.weight"] @ x + w["gating.layers.3.bias"]) / 10, dim=0)
        * w["gating.logit_scale"][0]
    )
    return float(((rewards @ w["reward_transform_matrix"]) * gate).sum())


def published_scores(groups: list[TokenGroup]) -> list[float]:
    return [published_score(group.prompt_ids + completion) for group in groups for completion in group.completion_ids]


def packed(folder: Path, layout: Layout, dtype: torch.dtype = torch.float32) -> PackedArmoRM:
    chat = ChatFormat.load(folder)
    loaded = load_packed_reward_model(folder, chat, dtype=dtype, device=CPU)
    assert isinstance(loaded, PackedArmoRM)
    assert loaded.layout is Layout.SEGMENTS
    return PackedArmoRM(loaded.model, layout, chat.header_ids)


@torch.inference_mode()
def scores(model: PackedArmoRM, groups: list[TokenGroup]) -> list[float]:
    scores_N: Tensor = model(lay_out(groups, model.layout, pad_id=llama().pad_id)).scores_N
    return scores_N.tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_armorm(tmp_path_factory.mktemp("models") / "armorm", weights=weights())


@pytest.mark.parametrize("layout", Layout)
def test_scores_in_every_layout_are_those_of_the_published_code_one_conversation_at_a_time(
    folder: Path, layout: Layout
) -> None:
    model, expected = packed(folder, layout), published_scores(groups())
    assert max(expected) - min(expected) > 0.5
    assert scores(model, groups()) == pytest.approx(expected, abs=1e-5)
    alone = [score for group in groups() for score in scores(model, [group])]
    assert alone == pytest.approx(expected, abs=1e-5)


def test_the_gate_and_where_it_is_read_matter(folder: Path) -> None:
    """The control: a gate at the prompt's last token, or at the first end of turn of several, gives other scores."""
    turns: list[Message] = [
        {"role": role, "content": content}
        for role, content in (("user", "red"), ("assistant", "blue"), ("user", "seven apples"))
    ]
    group = TokenGroup(llama().prompt_ids(turns), [llama().completion_ids("green river")])
    (score,) = scores(packed(folder, Layout.SEGMENTS), [group])
    ids, prompt_length = group.prompt_ids + group.completion_ids[0], len(group.prompt_ids)
    assert score == pytest.approx(published_score(ids), abs=1e-5)
    for elsewhere in (prompt_length - 1, prompt_length - 4, ids.index(llama().end_of_turn_id), len(ids) - 1):
        assert abs(score - published_score(ids, lambda _, column=elsewhere: column)) > 1e-3  # type: ignore[misc]
    uniform = copy.deepcopy(packed(folder, Layout.SEGMENTS))
    for name, weight in uniform.model.gating.layers.named_parameters():
        if name.startswith("3."):
            weight.data.zero_()
    assert abs(score - scores(uniform, [group])[0]) > 1e-3


def test_hidden_states_are_those_of_the_last_token(folder: Path) -> None:
    (group,) = groups(1)
    with torch.inference_mode():
        scored = packed(folder, Layout.SEGMENTS)(lay_out([group], Layout.SEGMENTS, pad_id=llama().pad_id))
        hidden_TH = published_decoder()(
            input_ids=torch.tensor([group.prompt_ids + group.completion_ids[0]])
        ).last_hidden_state[0]
    assert torch.allclose(scored.hidden_after_final_norm_NH[0].double(), hidden_TH[-1], atol=1e-4)
    normed_H = F.rms_norm(
        scored.hidden_before_final_norm_NH[0], (64,), weights()["model.norm.weight"], CONFIG["rms_norm_eps"]
    )  # type: ignore[arg-type]
    assert torch.allclose(normed_H.double(), hidden_TH[-1], atol=1e-4)


def test_weights_in_several_files_are_the_same_model(folder: Path, tmp_path: Path) -> None:
    several = save_tiny_armorm(tmp_path / "several", weights=weights(), num_files=3)
    assert scores(packed(several, Layout.SEGMENTS), groups()) == scores(packed(folder, Layout.SEGMENTS), groups())


def test_a_bfloat16_decoder_keeps_heads_and_scores_in_float32(folder: Path) -> None:
    model = packed(folder, Layout.PADDED, torch.bfloat16)
    dtypes = {name: weight.dtype for name, weight in model.model.named_parameters()}
    assert {dtype for name, dtype in dtypes.items() if name.startswith("model.")} == {torch.bfloat16}
    assert {dtype for name, dtype in dtypes.items() if not name.startswith("model.")} == {torch.float32}
    assert scores(model, groups()) == pytest.approx(published_scores(groups()), abs=0.1)


@pytest.mark.parametrize("layout", Layout)
def test_a_prompt_that_does_not_end_in_the_assistant_header_is_refused(folder: Path, layout: Layout) -> None:
    """The second prompt is the header without its first token, and the group before it ends with that token."""
    model, header, end = packed(folder, layout), llama().header_ids, llama().end_of_turn_id
    for prompt in ([7, 8, 9], header[1:], header[:-1], [*header, 5]):
        with pytest.raises(ScoringError, match=r"completions \[1, 2\] of a batch do not end in the assistant header"):
            scores(model, [TokenGroup(header, [[5, end]]), TokenGroup(prompt, [[6, end], [8, end]])])


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as refused:
        load_packed_reward_model(folder, ChatFormat.load(folder), dtype=torch.float32, device=CPU)
    return str(refused.value)


def without(name: str) -> dict[str, Tensor]:
    return {other: weight for other, weight in weights().items() if other != name}


@pytest.mark.parametrize(
    "name",
    ["model.layers.1.mlp.up_proj.weight", "regression_layer.weight", "gating.layers.3.bias", "gating.logit_scale"],
)
def test_a_missing_weight_is_refused_by_its_name(tmp_path: Path, name: str) -> None:
    assert f"Weights 1 missing: {name}." in refusal(save_tiny_armorm(tmp_path / "model", weights=without(name)))


@pytest.mark.parametrize("name", ["gating.layers.4.weight", "score.weight", "model.layers.2.mlp.up_proj.weight"])
def test_an_unexpected_weight_is_refused_by_its_name(tmp_path: Path, name: str) -> None:
    assert f"Weights 1 unexpected: {name}." in refusal(
        save_tiny_armorm(tmp_path / "model", weights={**weights(), name: torch.zeros(2, 2)})
    )


def test_a_weight_of_another_shape_is_refused_by_its_name_and_shapes(tmp_path: Path) -> None:
    """QRM names the same architecture and has 19 objectives with 5 quantiles each."""
    quantiles = save_tiny_armorm(
        tmp_path / "quantiles", weights={**weights(), "regression_layer.weight": torch.zeros(95, 64)}
    )
    assert "1 of another shape: regression_layer.weight [95, 64] instead of [19, 64]" in refusal(quantiles)
    wide = refusal(save_tiny_armorm(tmp_path / "wide", config={"gating_hidden_dim": 1024}))
    assert "gating.layers.0.weight [32, 64] instead of [1024, 64]" in wide
    deep = refusal(save_tiny_armorm(tmp_path / "deep", config={"gating_n_hidden": 4}))
    assert "2 missing: gating.layers.4.bias, gating.layers.4.weight; 2 of another shape: gating.layers.3.weight" in deep


def test_a_file_that_is_missing_or_cut_off_is_refused(tmp_path: Path) -> None:
    several = save_tiny_armorm(tmp_path / "several", num_files=2)
    (several / "model-00002-of-00002.safetensors").unlink()
    assert "lacks ['model-00002-of-00002.safetensors']" in refusal(several)
    cut = save_tiny_armorm(tmp_path / "cut")
    content = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(content[: len(content) // 2])
    assert "model.safetensors is not a whole safetensors file" in refusal(cut)


@pytest.mark.parametrize(
    ("key", "value"),
    [("gating_temperature", 0), ("gating_temperature", "10"), ("gating_n_hidden", 2.5), ("num_objectives", -19)],
)
def test_a_setting_of_the_gate_that_is_no_positive_number_is_refused(tmp_path: Path, key: str, value: object) -> None:
    assert f"config.json has {key} = {value!r}; it must be a positive number" in refusal(
        save_tiny_armorm(tmp_path / "model", config={key: value})
    )


def with_template(template: str) -> ChatFormat:
    tokenizer = copy.deepcopy(llama().tokenizer)
    tokenizer.chat_template = template
    return ChatFormat(tokenizer, source="other")


@pytest.mark.parametrize(
    "template",
    [
        LLAMA_TEMPLATE.replace("assistant<|end_header_id|>\\n\\n", "assistant<|end_header_id|>\\n").replace(
            "<|end_header_id|>\\n\\n", "<|end_header_id|>\\n"
        ),
        LLAMA_TEMPLATE.replace("{% if add_generation_prompt %}", "").removesuffix(
            "{% endif %}"
        ),  # always writes the header
    ],
)
def test_another_template_is_refused(tmp_path: Path, template: str) -> None:
    assert template != LLAMA_TEMPLATE
    message = refusal(save_tiny_armorm(tmp_path / "model", tokenizer=with_template(template).tokenizer))
    assert "ArmoRM reads its gate at '<|eot_id|><|start_header_id|>assistant<|end_header_id|>\\n\\n'" in message


def test_another_models_tokenizer_is_refused(tmp_path: Path) -> None:
    assert "ends a prompt in '<|im_end|>\\n<|im_start|>assistant\\n'" in refusal(
        save_tiny_armorm(tmp_path / "model", tokenizer=tiny_tokenizer())
    )


@pytest.mark.parametrize(
    "architectures", [["LlamaForRewardModelWithGating31"], ["InternLM2ForRewardModel"], ["LlamaForCausalLM"], [], None]
)
def test_a_head_that_is_not_known_is_refused_by_its_name(tmp_path: Path, architectures: list[str] | None) -> None:
    message = refusal(save_tiny_armorm(tmp_path / "model", config={"architectures": architectures}))
    assert (
        f"has the architecture {architectures[0] if architectures else '[]'}, whose head is not known here" in message
    )
    assert (
        "The known architectures are …ForSequenceClassification with one score (num_labels=1) and "
        "LlamaForRewardModelWithGating" in message
    )


def save_one_score(folder: Path) -> Path:
    tiny_reward_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_code_of_its_own_is_refused_in_a_model_that_has_one_score(tmp_path: Path) -> None:
    folder = save_one_score(tmp_path / "file")
    (folder / "modeling_x.py").write_text("raise SystemExit('code of the model was run')\n")
    assert "brings its own code (modeling_x.py), which is never run here" in refusal(folder)
    mapped = save_one_score(tmp_path / "mapped")
    config = json.loads((mapped / "config.json").read_text())
    (mapped / "config.json").write_text(
        json.dumps({**config, "auto_map": {"AutoModel": "other/repository--modeling.X"}})
    )
    assert "brings its own code" in refusal(mapped)


def test_a_weight_that_the_one_score_model_would_leave_unused_is_refused_by_its_name(tmp_path: Path) -> None:
    model = tiny_reward_model()
    model.save_pretrained(
        tmp_path,
        state_dict={**model.state_dict(), "score.bias": torch.zeros(1), "value_head.weight": torch.zeros(1, 64)},
    )
    tiny_tokenizer().save_pretrained(tmp_path)
    assert "does not use: ['score.bias', 'value_head.weight']" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "original/consolidated.00.pth", "value_head.pt"])
def test_pickled_files_are_refused_by_their_names(tmp_path: Path, name: str) -> None:
    for folder in (save_tiny_armorm(tmp_path / "armorm"), save_one_score(tmp_path / "one_score")):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"\x80\x04")
        assert f"holds pickled files, which can run code when they are read: {name}." in refusal(folder)


def test_a_model_with_one_score_still_loads_as_before(tmp_path: Path) -> None:
    folder = save_one_score(tmp_path / "model")
    loaded = load_packed_reward_model(folder, ChatFormat.load(folder), dtype=torch.float32, device=CPU)
    group = random_group(Random(0), num_completions=2)
    with torch.inference_mode():
        scores_N = loaded(lay_out([group], loaded.layout, pad_id=0)).scores_N
        expected = [
            tiny_reward_model()(input_ids=torch.tensor([group.prompt_ids + ids])).logits.item()
            for ids in group.completion_ids
        ]
    assert scores_N.tolist() == pytest.approx(expected, abs=1e-4)
