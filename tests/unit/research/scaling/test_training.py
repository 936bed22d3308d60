"""Time of training: FLOPs agree with torch's own counter, operators with a count, and traffic with hand counts."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2ForSequenceClassification

from research.scaling.hardware import GPUS
from research.scaling.memory import Trained
from research.scaling.plans import Lengths, adapter_parameters, reward_model_plan
from research.scaling.shapes import ModelShape, shape_of_config
from research.scaling.training import (
    Passes,
    Tokens,
    attention_calls,
    compute_seconds,
    forward_flops,
    layer_calls,
    passes_of_step,
    sent_bytes,
    step_flops,
    step_seconds,
)
from rm_robust.config.objectives import Objective
from rm_robust.config.shared import ComputeConfig, StrategyConfig, WorkersConfig
from rm_robust.config.training import LoraConfig, ModelConfig, RewardModelConfig
from rm_robust.data.records import TokenGroup
from rm_robust.models.packing import Layout, PackedBatch, lay_out
from rm_robust.models.policy import PackedPolicy
from rm_robust.models.reward_model import PackedRewardModel

MODEL = ModelConfig(hidden_size=128, intermediate_size=224, num_layers=3, num_heads=4, num_kv_heads=2, vocab_size=300)
SHAPE = shape_of_config(MODEL)
P = 1000
TRAINED = Trained(SHAPE, P, P)


def policy(num_layers: int = MODEL.num_layers) -> PackedPolicy:
    config = Qwen2Config(
        vocab_size=MODEL.vocab_size,
        hidden_size=MODEL.hidden_size,
        intermediate_size=MODEL.intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=MODEL.num_heads,
        num_key_value_heads=MODEL.num_kv_heads,
        tie_word_embeddings=True,
        pad_token_id=0,
    )
    return PackedPolicy(Qwen2ForCausalLM(config).eval(), Layout.SEGMENTS, temperature=1.0)


def batch(num_groups: int, num_completions: int) -> PackedBatch:
    return lay_out([TokenGroup([5] * 24, [[6] * 20] * num_completions)] * num_groups, Layout.SEGMENTS, pad_id=0)


def test_flops_of_a_forward_and_backward_pass_are_torchs_own_count() -> None:
    """The counts are equal to one per cent.

    torch's counter leaves out the CPU's attention kernel, so a token sees nothing here; a later test checks attention.
    The embedding needs no gradient of its input, and the gradient of a tied table is part of the head's.
    """
    model, packed = policy(), batch(3, 2)
    tokens = Tokens(packed.num_tokens, 0, 3, 2, num_predicted=len(packed.target_ids_M))
    with FlopCounterMode(display=False) as counter:
        logprobs_M, _ = model(packed)
    assert counter.get_total_flops() == pytest.approx(forward_flops(SHAPE, tokens), rel=0.01)
    with FlopCounterMode(display=False) as counter:
        logprobs_M.sum().backward()
    assert counter.get_total_flops() == pytest.approx(step_flops(SHAPE, tokens, Passes(0, 1)), rel=0.01)


def test_flops_of_a_reward_model_on_a_cpu_are_torchs_own_count_with_the_last_layer_at_the_scored_tokens() -> None:
    """The counter leaves out attention here too. The head's H products per completion are within the one per cent."""
    config = Qwen2Config(
        vocab_size=MODEL.vocab_size,
        hidden_size=MODEL.hidden_size,
        intermediate_size=MODEL.intermediate_size,
        num_hidden_layers=MODEL.num_layers,
        num_attention_heads=MODEL.num_heads,
        num_key_value_heads=MODEL.num_kv_heads,
        num_labels=1,
        pad_token_id=0,
    )
    model, packed = PackedRewardModel(Qwen2ForSequenceClassification(config).eval(), Layout.SEGMENTS), batch(3, 2)
    tokens = Tokens(packed.num_tokens, 0, 3, 2, num_scored=6)
    with FlopCounterMode(display=False) as counter:
        scored = model(packed)
    assert counter.get_total_flops() == pytest.approx(forward_flops(SHAPE, tokens), rel=0.01)
    assert forward_flops(SHAPE, tokens) < 0.8 * forward_flops(SHAPE, replace(tokens, num_scored=None))
    with FlopCounterMode(display=False) as counter:
        scored.scores_N.sum().backward()
    assert counter.get_total_flops() == pytest.approx(step_flops(SHAPE, tokens, Passes(0, 1)), rel=0.01)


def test_flops_of_attention_are_torchs_own_count_of_its_two_products() -> None:
    """Eager attention computes the whole square: each of T tokens sees T tokens."""
    length = 40
    config = Qwen2Config(
        vocab_size=300,
        hidden_size=MODEL.hidden_size,
        intermediate_size=MODEL.intermediate_size,
        num_hidden_layers=MODEL.num_layers,
        num_attention_heads=MODEL.num_heads,
        num_key_value_heads=MODEL.num_kv_heads,
        attn_implementation="eager",
    )
    model = Qwen2ForCausalLM(config).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.full((1, length), 7))
    assert counter.get_total_flops() == pytest.approx(
        forward_flops(SHAPE, Tokens(length, length, 1, num_predicted=length)), rel=0.01
    )


def test_checkpointing_and_coupled_batches_cost_a_forward_pass_each() -> None:
    plain, checkpointed = ComputeConfig(), ComputeConfig(gradient_checkpointing=True)
    tokens = Tokens(100, 0, 1)
    per_token = 2 * SHAPE.num_layers * SHAPE.matrix_parameters_per_layer * 100
    for compute, is_coupled, num_micro_batches, factor in [
        (plain, False, 3, 3),
        (checkpointed, False, 3, 4),
        (plain, True, 1, 3),
        (plain, True, 3, 4),
        (checkpointed, True, 3, 5),
    ]:
        passes = passes_of_step(compute, is_batch_coupled=is_coupled, num_micro_batches=num_micro_batches)
        assert step_flops(SHAPE, tokens, passes) == factor * per_token


class CallCounter(TorchDispatchMode):
    """Count the operators that are called, views included."""

    count = 0

    def __torch_dispatch__(
        self, function: Any, types: object, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("num_completions", [1, 2, 4])
def test_a_layer_calls_as_many_operators_as_the_formula_says(num_completions: int) -> None:
    packed = batch(3, num_completions)

    def counted(num_layers: int) -> tuple[int, int]:
        model = policy(num_layers)
        with CallCounter() as forward:
            logprobs_M, _ = model(packed)
        with CallCounter() as backward:
            logprobs_M.sum().backward()
        return forward.count, backward.count

    one, three = counted(1), counted(3)
    tokens = Tokens(packed.num_tokens, 0, 3, num_completions)
    for direction in (0, 1):
        assert (three[direction] - one[direction]) / 2 == pytest.approx(
            layer_calls(tokens, direction) + attention_calls(tokens, direction), rel=0.03
        )


def test_each_term_of_a_step_is_its_hand_count() -> None:
    """The model has width 1 and the batch 10 tokens. One rate at a time is finite."""
    shape = ModelShape("flat", 1, 1, 1, 1, 1, 1, 1, is_tied=True, has_qkv_bias=False)
    trained, tokens, passes = Trained(shape, 5, 5), Tokens(10, 0, 2, 2), Passes(1, 1)
    idle = replace(GPUS["h100"], peak_flops_per_s=float("inf"), memory_bytes_per_s=float("inf"))
    assert (
        compute_seconds(trained, tokens, passes, replace(idle, peak_flops_per_s=100.0, utilisation=0.5))
        == 7 * 10 * 6 / 50
    )
    assert compute_seconds(trained, tokens, passes, replace(idle, memory_bytes_per_s=16.0)) == 32 * 5 / 16
    traffic = 10 * (152.5 + 45.3 + 20.6 + 166 + 461.9 + 70.1 + 34.4 + 100)
    assert compute_seconds(trained, tokens, passes, replace(idle, activation_bytes_per_s=2.0)) == pytest.approx(
        traffic / 2
    )
    assert compute_seconds(trained, tokens, passes, replace(idle, kernel_s=0.5)) == (82 + 153) / 2
    assert (
        compute_seconds(trained, tokens, passes, replace(idle, attention_call_s=(0.5, 0.25)))
        == (4 * 4 + 2 * 11) / 2 + (4 * 19 + 2 * 19) / 4
    )


def test_what_a_device_sends_is_the_hand_count() -> None:
    """4,000 bytes of weights and as many of gradients on 4 devices send three quarters of their bytes in each pass."""

    def sent(strategy: StrategyConfig, *, num_micro_batches: int, num_first_passes: int = 0) -> float:
        return sent_bytes(
            TRAINED, strategy, num_devices=4, num_micro_batches=num_micro_batches, num_first_passes=num_first_passes
        )

    zero = {stage: StrategyConfig.model_validate({"kind": "deepspeed", "zero_stage": stage}) for stage in (1, 2, 3)}
    assert sent(StrategyConfig(kind="ddp"), num_micro_batches=5) == 2 * 3000
    for strategy in (StrategyConfig(kind="fsdp2"), zero[3]):
        assert sent(strategy, num_micro_batches=1) == 3 * 3000
        assert sent(strategy, num_micro_batches=5, num_first_passes=1) == 5 * 4 * 3000
    for strategy in (zero[1], zero[2]):
        assert sent(strategy, num_micro_batches=5) == 5 * 3000 + 3000
    assert sent_bytes(TRAINED, StrategyConfig(kind="ddp"), num_devices=1, num_micro_batches=1, num_first_passes=0) == 0


def test_deepspeed_sends_after_it_has_computed_and_fsdp2_meanwhile() -> None:
    assert step_seconds(2, 3, StrategyConfig(kind="deepspeed")) == 5
    assert step_seconds(2, 3, StrategyConfig(kind="fsdp2")) == 3


def test_a_reward_models_hours_are_its_flops_over_what_the_gpus_do() -> None:
    """8 GPUs train Bradley-Terry with one micro-batch each: 6 FLOPs per weight and token, and attention in addition."""
    settings = RewardModelConfig(
        objective="bt", batch_size=64, workers=WorkersConfig(num_workers=8), compute=ComputeConfig(precision="bfloat16")
    )
    gpu = replace(GPUS["h100"], utilisation=0.5, memory_bytes_per_s=float("inf"), link_bytes_per_s=float("inf"))
    lengths = Lengths(100, 200)
    plan = reward_model_plan(settings, SHAPE, lengths, gpu)
    flops = (
        6 * 500 * SHAPE.num_layers * (SHAPE.matrix_parameters_per_layer + 2 * lengths.visible(2) * SHAPE.query_width)
    )
    assert plan.device_hours(1e6) == pytest.approx(1e6 * flops / (0.5 * 989e12) / 3600)
    assert plan.tokens_per_s == pytest.approx(8 * 0.5 * 989e12 / (flops / 500))


def test_a_coupled_objective_gathers_the_weights_once_more_in_every_micro_batch() -> None:
    """512 pairs of 500 tokens on 8 GPUs are 4 micro-batches.

    A coupled objective makes 4 passes over the weights instead of 3, and needs 4/3 of the FLOPs.
    """
    settings = RewardModelConfig(
        batch_size=512, workers=WorkersConfig(num_workers=8), strategy=StrategyConfig(kind="fsdp2")
    )
    coupled, single = (
        reward_model_plan(settings.model_copy(update={"objective": objective}), SHAPE, Lengths(100, 200), GPUS["h100"])
        for objective in (Objective.BATCH_SUM_TO_ZERO, Objective.BRADLEY_TERRY)
    )
    assert coupled.sent_bytes / single.sent_bytes == pytest.approx(4 / 3)
    assert coupled.flops / single.flops == pytest.approx(4 / 3)
    assert single.sent_bytes == pytest.approx(4 * 3 * 4 * SHAPE.reward_model_parameters * 7 / 8)


def test_adapters_need_two_thirds_of_the_arithmetic_and_little_traffic() -> None:
    """A frozen weight needs 4 FLOPs per token instead of 6, as flops_per_token (rm_robust/models/compute.py) counts.

    Only the gradients of the adapters are sent.
    """
    settings = RewardModelConfig(objective="bt", workers=WorkersConfig(num_workers=2))
    whole, adapted = (
        reward_model_plan(settings.model_copy(update={"lora": lora}), SHAPE, Lengths(100, 200), GPUS["h100"])
        for lora in (None, LoraConfig(rank=2))
    )
    assert adapted.flops / whole.flops == pytest.approx(2 / 3)
    assert adapted.sent_bytes == 4 * adapter_parameters(SHAPE, LoraConfig(rank=2))
