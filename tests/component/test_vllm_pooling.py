"""A trained reward-model checkpoint loads unchanged in vLLM's pooling runner.

The runner gives the same raw scores as transformers.
"""

from pathlib import Path

import pytest
import torch

from rm_robust.data.chat import ChatFormat
from rm_robust.models.reward_model import load_reward_model
from tests.support.trained_reward_model import NUM_PAIRS, texts, train_and_commit


@pytest.mark.timeout(300)
@pytest.mark.parametrize("with_lora", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["full", "lora"])
def test_vllm_gives_the_raw_scores_of_transformers(with_lora: bool, tmp_path: Path) -> None:
    from vllm import LLM
    from vllm.config import PoolerConfig

    checkpoint = train_and_commit(tmp_path, with_lora=with_lora)
    chat = ChatFormat.load(checkpoint)
    rows = [
        chat.prompt_ids(prompt) + chat.completion_ids(text)
        for prompt, *both in map(texts, range(NUM_PAIRS))
        for text in both
    ]
    model = load_reward_model(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        expected = [float(model(input_ids=torch.tensor([ids])).logits[0, 0]) for ids in rows]
    assert max(expected) - min(expected) > 0.5
    engine = LLM(
        str(checkpoint),
        runner="pooling",
        dtype="float32",
        enforce_eager=True,
        max_model_len=128,
        kv_cache_memory_bytes=2**24,
        pooler_config=PoolerConfig(use_activation=False),
    )
    outputs = engine.encode([{"prompt_token_ids": ids} for ids in rows], pooling_task="classify", use_tqdm=False)
    assert [float(output.outputs.data[0]) for output in outputs] == pytest.approx(expected, abs=1e-4)
