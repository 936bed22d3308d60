"""The trainer's side of the probe, against transformers' own forward pass."""

import pytest
import torch
from transformers import Qwen2ForCausalLM

from rm_robust.config.shared import ComputeConfig
from rm_robust.models.packing import Layout
from rm_robust.models.policy import PackedPolicy
from rm_robust.rloo.weights.probe import NUM_PROBE_TOKENS, policy_probe, spread_token_ids
from tests.support.tiny_models import TRAINED_ON_CPU, VOCABULARY_SIZE, tiny_qwen2_config


def test_probe_tokens_are_different_and_spread_over_the_vocabulary() -> None:
    assert spread_token_ids(8000) == [0, 1000, 2000, 3000, 4000, 5000, 6000, 7000]
    assert len(spread_token_ids(NUM_PROBE_TOKENS)) == len(set(spread_token_ids(NUM_PROBE_TOKENS)))


@pytest.mark.parametrize("layout", TRAINED_ON_CPU)
def test_the_probe_is_transformers_own_forward_pass_whatever_the_policy_trains_with(layout: Layout) -> None:
    """Neither the sampling temperature nor bfloat16 products affect it, and it follows the weights."""
    torch.manual_seed(0)
    model, plain = (Qwen2ForCausalLM(tiny_qwen2_config(tie_word_embeddings=True)) for _ in range(2))
    probe = policy_probe(PackedPolicy(model, layout, temperature=0.5, compute=ComputeConfig(precision="bfloat16")))
    for _ in range(2):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.05)
            plain.load_state_dict(model.state_dict())
            token_ids = torch.tensor(spread_token_ids(VOCABULARY_SIZE))
            logprobs_TV = plain(token_ids[None]).logits[0].log_softmax(-1)
        expected = logprobs_TV[:-1].gather(1, token_ids[1:, None]).squeeze(1).tolist()
        assert probe.trainer_logprobs() == pytest.approx(expected, abs=1e-5)
