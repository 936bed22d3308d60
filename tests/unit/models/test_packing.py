"""Four ways give the same numbers: segments, FlexAttention, padded rows, and plain transformers.

Plain transformers computes one completion at a time.
"""

import copy
import itertools
import json
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from rm_robust.config.shared import ComputeConfig
from rm_robust.data.records import TokenGroup
from rm_robust.models.packing import (
    Layout,
    choose_layout,
    fill_bins,
    group_length,
    lay_out,
    micro_batches,
    num_positions,
)
from rm_robust.models.policy import PackedPolicy
from rm_robust.models.reward_model import PackedRewardModel
from tests.support.tiny_models import TRAINED_ON_CPU, gradients_of, random_group, tiny_reward_model

PAD = 0
CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 330,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "pad_token_id": PAD,
}
FAMILIES: dict[str, type[PretrainedConfig]] = {
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "llama": LlamaConfig,
    "mistral": MistralConfig,
}


def config_of(family: str) -> PretrainedConfig:
    return FAMILIES[family](**SIZES, num_labels=1, **({"sliding_window": None} if family == "mistral" else {}))


def random_groups(seed: int, counts: list[int]) -> list[TokenGroup]:
    rng = Random(seed)
    return [random_group(rng, num_completions=count) for count in counts]


def packed_scores(model: PreTrainedModel, groups: list[TokenGroup], layout: Layout) -> Tensor:
    scores: Tensor = PackedRewardModel(model, layout)(lay_out(groups, layout, pad_id=PAD)).scores_N
    return scores


def single_scores(model: PreTrainedModel, groups: list[TokenGroup]) -> Tensor:
    """Score with plain transformers, one unpadded row at a time, pooled by transformers."""
    rows = [torch.tensor([group.prompt_ids + completion]) for group in groups for completion in group.completion_ids]
    return torch.cat([model(input_ids=row).logits[0] for row in rows])


def assert_close_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            actual[name], gradient, atol=2e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_and_gradients_are_the_same_in_segments_padded_and_one_at_a_time(family: str) -> None:
    torch.manual_seed(0)
    plain = AutoModelForSequenceClassification.from_config(config_of(family))
    groups = random_groups(0, [1, 2, 4, 2, 1])
    weights_N = torch.randn(10)
    expected = single_scores(plain, groups)
    assert expected.std() > 0.1  # the scores say something
    expected_gradients = gradients_of(plain, (expected * weights_N).sum())
    for layout in Layout:
        model = copy.deepcopy(plain)
        with torch.set_grad_enabled(layout in TRAINED_ON_CPU):
            scores = packed_scores(model, groups, layout)
        torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)
        if layout in TRAINED_ON_CPU:
            assert_close_gradients(gradients_of(model, (scores * weights_N).sum()), expected_gradients)


REWARD_MODEL = tiny_reward_model()
LAID_OUT = {layout: copy.deepcopy(REWARD_MODEL) for layout in Layout}


@given(
    seed=st.integers(0, 10**6),
    counts=st.lists(st.sampled_from([1, 2, 4]), min_size=1, max_size=4),
    max_tokens=st.integers(1, 200),
)
@settings(max_examples=20)
def test_scores_do_not_depend_on_the_layout_the_bin_size_or_on_what_is_packed_beside_them(
    seed: int, counts: list[int], max_tokens: int
) -> None:
    groups = random_groups(seed, counts)
    with torch.inference_mode():
        expected = single_scores(REWARD_MODEL, groups).split(counts)
        for layout, model in LAID_OUT.items():
            for members in micro_batches(groups, layout, max_tokens):
                expected_part = torch.cat([expected[i] for i in members])
                torch.testing.assert_close(
                    packed_scores(model, [groups[i] for i in members], layout), expected_part, atol=1e-5, rtol=1e-5
                )


def test_a_completion_neither_sees_nor_moves_its_siblings() -> None:
    (group,) = random_groups(3, [3])
    changed = TokenGroup(group.prompt_ids, [[5] * 40, group.completion_ids[1], [7, 8]])
    for layout in Layout:
        model = copy.deepcopy(REWARD_MODEL)
        with torch.inference_mode():
            before, after = packed_scores(model, [group], layout), packed_scores(model, [changed], layout)
        torch.testing.assert_close(before[1], after[1], atol=1e-5, rtol=1e-5)
        assert abs(before[0] - after[0]) > 1e-3


@pytest.mark.parametrize(("num_completions", "temperature"), [(1, 1.0), (2, 0.7), (4, 1.0)])
def test_token_logprobs_and_entropies_are_those_of_a_plain_forward(num_completions: int, temperature: float) -> None:
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(config_of("qwen2"))
    groups = random_groups(1, [num_completions] * 3)
    logprobs, entropies, owners = [], [], []
    rows = [(group.prompt_ids, completion) for group in groups for completion in group.completion_ids]
    for n, (prompt, completion) in enumerate(rows):
        logits_TV = plain(input_ids=torch.tensor([prompt + completion])).logits[0] / temperature
        predicted_TV = logits_TV[len(prompt) - 1 : -1].log_softmax(-1)
        logprobs.append(predicted_TV[range(len(completion)), completion])
        entropies.append(torch.distributions.Categorical(logits=predicted_TV).entropy())
        owners += [n] * len(completion)
    expected_M = torch.cat(logprobs)
    weights_M = torch.randn(len(expected_M))
    expected_gradients = gradients_of(plain, (expected_M * weights_M).sum())
    for layout in TRAINED_ON_CPU:
        model = copy.deepcopy(plain)
        batch = lay_out(groups, layout, pad_id=PAD)
        logprobs_M, entropy_M = PackedPolicy(model, layout, temperature=temperature)(batch)
        assert batch.completion_of_M.tolist() == owners
        torch.testing.assert_close(logprobs_M, expected_M, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(entropy_M, torch.cat(entropies), atol=1e-5, rtol=1e-5)
        assert_close_gradients(gradients_of(model, (logprobs_M * weights_M).sum()), expected_gradients)


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="FlexAttention trains on CUDA only, and this machine has none"
)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_flex_trains_as_padded_rows_do_on_cuda(precision: str) -> None:
    groups, cuda = random_groups(0, [1, 2, 4, 2, 1]), torch.device("cuda")
    results = {}
    for layout in (Layout.FLEX, Layout.PADDED):
        packed = PackedRewardModel(
            copy.deepcopy(REWARD_MODEL), layout, ComputeConfig.model_validate({"precision": precision})
        ).to(cuda)
        scores = packed(lay_out(groups, layout, pad_id=PAD).to(cuda)).scores_N
        gradients = gradients_of(packed.model, scores.square().sum())
        results[layout] = scores.detach(), torch.cat([gradient.flatten() for gradient in gradients.values()])
    tolerance = 1e-3 if precision == "float32" else 0.05
    for flex, padded in zip(*results.values(), strict=True):
        assert (flex - padded).norm() < tolerance * padded.norm()


def test_segments_compute_every_prompt_once_and_no_padding() -> None:
    groups = random_groups(2, [4, 1, 2])
    assert lay_out(groups, Layout.SEGMENTS, pad_id=PAD).num_tokens == sum(group_length(group) for group in groups)


def test_a_pair_is_laid_out_as_worked_out_by_hand() -> None:
    batch = lay_out([TokenGroup([10, 11], [[20, 21, 22], [30]]), TokenGroup([12], [[40]])], Layout.SEGMENTS, pad_id=PAD)
    assert batch.input_ids_RT.tolist() == [[10, 11, 20, 21, 22, 30, 12, 40]]
    assert batch.position_ids_RT.tolist() == [[0, 1, 2, 3, 4, 2, 0, 1]]
    assert batch.scored_index_N.tolist() == [4, 5, 7]
    assert batch.predictor_index_M.tolist() == [1, 2, 3, 1, 6]
    assert batch.target_ids_M.tolist() == [20, 21, 22, 30, 40]
    assert batch.completion_of_M.tolist() == [0, 0, 0, 1, 2]


def test_padding_with_a_token_that_occurs_in_the_text_changes_nothing() -> None:
    groups = [TokenGroup([5, 6], [[7, 7], [7]])]
    model = PackedRewardModel(copy.deepcopy(REWARD_MODEL), Layout.PADDED)
    torch.testing.assert_close(
        model(lay_out(groups, Layout.PADDED, pad_id=7)).scores_N,
        model(lay_out(groups, Layout.PADDED, pad_id=PAD)).scores_N,
    )


def test_segments_are_chosen_only_for_full_attention_decoders_on_cpu() -> None:
    for family in FAMILIES:
        assert choose_layout(config_of(family), CPU) is Layout.SEGMENTS
        assert choose_layout(config_of(family), torch.device("cuda")) is Layout.FLEX
    assert choose_layout(MistralConfig(**SIZES, sliding_window=8), CPU) is Layout.PADDED
    assert (
        choose_layout(Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=1), CPU)
        is Layout.PADDED
    )
    assert choose_layout(PretrainedConfig(), CPU) is Layout.PADDED


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_type": "default"}, 128),
        ({"rope_type": "dynamic", "factor": 2.0}, 128),
        ({"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 64}, 64),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}, 128),
        ({"rope_type": "longrope", "factor": 2.0, "original_max_position_embeddings": 64}, 64),
    ],
)
def test_texts_end_where_positions_would_begin_to_depend_on_the_longest_row(
    rope: dict[str, object], expected: int
) -> None:
    config = config_of("llama")
    config.rope_parameters = {"rope_theta": 10000.0, **rope}
    assert num_positions(config) == expected


def test_a_config_without_a_limit_of_positions_has_none() -> None:
    assert num_positions(PretrainedConfig()) is None


def test_a_packed_model_saves_as_a_plain_transformers_model(tmp_path: Path) -> None:
    groups = random_groups(4, [2, 2])
    model = PackedRewardModel(copy.deepcopy(REWARD_MODEL), Layout.SEGMENTS)
    scores = model(lay_out(groups, Layout.SEGMENTS, pad_id=PAD)).scores_N
    model.model.save_pretrained(tmp_path)
    assert "segments" not in (tmp_path / "config.json").read_text()
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["Qwen2ForSequenceClassification"]
    torch.testing.assert_close(
        single_scores(AutoModelForSequenceClassification.from_pretrained(tmp_path), groups),
        scores,
        atol=1e-5,
        rtol=1e-5,
    )


@given(lengths=st.lists(st.integers(1, 50), max_size=40), max_tokens=st.integers(1, 80))
def test_bins_hold_every_index_once_and_exceed_the_budget_only_with_a_single_longer_item(
    lengths: list[int], max_tokens: int
) -> None:
    bins = fill_bins(lengths, max_tokens)
    assert sorted(index for members in bins for index in members) == list(range(len(lengths)))
    assert all(members for members in bins)
    assert all(sum(lengths[i] for i in members) <= max_tokens or len(members) == 1 for members in bins)


@given(lengths=st.lists(st.integers(1, 50), min_size=2, max_size=40), max_tokens=st.integers(1, 80))
def test_no_two_bins_would_fit_into_one(lengths: list[int], max_tokens: int) -> None:
    loads = sorted(sum(lengths[i] for i in members) for members in fill_bins(lengths, max_tokens))
    assert len(loads) == 1 or loads[0] + loads[1] > max_tokens


@given(
    seed=st.integers(0, 10**6), counts=st.lists(st.sampled_from([1, 2, 4]), max_size=12), max_tokens=st.integers(1, 200)
)
def test_padded_batches_hold_every_group_once_within_the_budget_and_sorted_by_length(
    seed: int, counts: list[int], max_tokens: int
) -> None:
    groups = random_groups(seed, counts)
    widths = [len(group.prompt_ids) + max(map(len, group.completion_ids)) for group in groups]
    batches = micro_batches(groups, Layout.PADDED, max_tokens)
    assert sorted(i for members in batches for i in members) == list(range(len(groups)))
    for members in batches:
        assert (
            len(members) == 1
            or lay_out([groups[i] for i in members], Layout.PADDED, pad_id=PAD).num_tokens <= max_tokens
        )
    for longer, shorter in itertools.pairwise(batches):
        assert min(widths[i] for i in longer) >= max(widths[i] for i in shorter)


def test_a_model_that_cannot_be_packed_is_named_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    choose_layout(MistralConfig(**SIZES, sliding_window=8), CPU)
    choose_layout(config_of("qwen2"), CPU)
    assert [record.getMessage() for record in caplog.records] == [
        "mistral has sliding-window or hybrid layers: prompts are not shared, "
        "and completions are computed in padded rows of similar lengths"
    ]


@pytest.mark.parametrize("group", [TokenGroup([], [[1]]), TokenGroup([1], [[]]), TokenGroup([1], [])])
@pytest.mark.parametrize("layout", list(Layout))
def test_a_group_without_a_prompt_or_completion_token_is_a_bug_of_ours(group: TokenGroup, layout: Layout) -> None:
    with pytest.raises(AssertionError, match="empty"):
        lay_out([group], layout, pad_id=PAD)
