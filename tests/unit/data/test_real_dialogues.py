"""Check that packed, padded and one-at-a-time training agree on real dialogues.

Groups with K = 2 come from hh-rlhf, those with K = 4 from RMB's best-of-N lists. The tests are skipped without --data.
"""

import copy
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen2ForSequenceClassification

from research.bench.preference_pairs import hh_rlhf_dialogues
from rm_robust.config.objectives import BsrScale, Objective
from rm_robust.config.training import RewardModelConfig
from rm_robust.data.records import TokenGroup
from rm_robust.models.packing import Layout, lay_out
from rm_robust.models.reward_model import PackedRewardModel
from rm_robust.training.reward_model.losses import objective_value
from tests.support.tiny_models import TRAINED_ON_CPU, tiny_reward_model, tiny_tokenizer

MAX_TOKENS = 512
BSR = RewardModelConfig(objective=Objective.BATCH_SUM_TO_ZERO, bsr_coefficient=0.05, bsr_scale=BsrScale.PAIRS)


def token_group(prompt: str, completions: list[str]) -> TokenGroup:
    encode = tiny_tokenizer().encode
    return TokenGroup(encode(prompt), [[*encode(text), 2] for text in completions])


def groups_of(data_dir: Path, num_completions: int) -> list[TokenGroup]:
    if num_completions == 2:
        texts = [
            ("\n".join(message["content"] for message in pair.prompt), [pair.chosen, pair.rejected])
            for pair in hh_rlhf_dialogues(data_dir)[:200]
        ]
    else:
        rows = pq.read_table(data_dir / "rmb_bon.parquet", columns=["messages", "best", "losers"]).to_pylist()
        lists = [("\n".join(m["content"] for m in row["messages"]), [row["best"], *row["losers"]]) for row in rows]
        texts = [
            (prompt, completions[:4])
            for prompt, completions in lists
            if len(completions) >= 4 and sum(map(len, [prompt, *completions[:4]])) < 3000
        ]
    groups = [token_group(*text) for text in texts[:60]]
    fitting = [g for g in groups if g.prompt_ids and len(g.prompt_ids) + max(map(len, g.completion_ids)) <= MAX_TOKENS]
    assert len(fitting) >= 6
    return fitting[:6]


@pytest.fixture(scope="module")
def model() -> Qwen2ForSequenceClassification:
    return tiny_reward_model(num_positions=MAX_TOKENS)


def gradients(model: PreTrainedModel, scores_N: Tensor, num_completions: int) -> dict[str, Tensor]:
    """Return the gradients of BSR over the pairs of each group's first completion and each of its others."""
    scores_GK = scores_N.view(-1, num_completions)
    pairs_B2 = torch.stack([scores_GK[:, :1].expand(-1, num_completions - 1).flatten(), scores_GK[:, 1:].flatten()], 1)
    model.zero_grad()
    (pairs_B2 * objective_value(pairs_B2, BSR).gradient_B2).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("num_completions", [2, 4])
@pytest.mark.parametrize("layout", TRAINED_ON_CPU)
def test_scores_and_gradients_on_real_dialogues_are_those_of_one_at_a_time(
    data_dir: Path, model: Qwen2ForSequenceClassification, num_completions: int, layout: Layout
) -> None:
    groups = groups_of(data_dir, num_completions)
    plain, packed = copy.deepcopy(model), copy.deepcopy(model)
    expected = torch.cat(
        [plain(input_ids=torch.tensor([g.prompt_ids + ids])).logits[0] for g in groups for ids in g.completion_ids]
    )
    assert expected.std() > 0.05
    scores = PackedRewardModel(packed, layout)(lay_out(groups, layout, pad_id=0)).scores_N
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)
    expected_gradients = gradients(plain, expected, num_completions)
    largest = max(float(gradient.abs().max()) for gradient in expected_gradients.values())
    for name, gradient in gradients(packed, scores, num_completions).items():
        torch.testing.assert_close(
            gradient,
            expected_gradients[name],
            atol=1e-5 * max(largest, 1),
            rtol=1e-4,
            msg=lambda text, name=name: f"{name}: {text}",
        )
