"""A trainer's memory agrees with hand counts, and its activations agree with what torch keeps."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen2Config, Qwen2ForSequenceClassification

from research.scaling.memory import (
    MicroBatch,
    Trained,
    last_layer_saved_bytes,
    saved_bytes_per_token_and_layer,
    trainer_memory,
)
from research.scaling.shapes import ModelShape, shape_of_config
from rm_robust.config.shared import ComputeConfig, StrategyConfig
from rm_robust.config.training import ModelConfig
from rm_robust.data.records import TokenGroup
from rm_robust.models.packing import Layout, lay_out
from rm_robust.models.reward_model import PackedRewardModel

P = 1000
SMALL = ModelShape("small", 10, 10, 20, 2, 2, 1, 5, is_tied=True, has_qkv_bias=False)
"""A model whose layer has 10 x (2 x 10 + 2 x 5) + 3 x 10 x 20 + 2 x 10 = 920 parameters."""
NOTHING = MicroBatch(0)
BUCKET, LIVE = 4 * 500_000_000, 4 * P


def states(strategy: StrategyConfig, num_devices: int, *, num_trained: int = P) -> tuple[float, float, float, float]:
    """Return the bytes of weights, gradients, optimiser and gathered values for a model of P parameters."""
    memory = trainer_memory(
        Trained(SMALL, P, num_trained),
        NOTHING,
        strategy=strategy,
        compute=ComputeConfig(),
        num_devices=num_devices,
        overhead_bytes=0,
    )
    return memory.weight_bytes, memory.gradient_bytes, memory.optimizer_bytes, memory.gathered_bytes


def test_states_by_strategy_are_the_hand_counts_on_four_devices() -> None:
    """In float32 a weight needs 4 bytes, its gradient 4 and its moments 8. DeepSpeed adds a copy of 4."""
    layers_and_rest = 2 * (2 * 4 * 920 + 4 * (P - 2 * 920))
    assert states(StrategyConfig(kind="ddp"), 4) == (4000, 4000, 8000, 4000)
    assert states(StrategyConfig(kind="fsdp2"), 4) == (1000, 1000, 2000, layers_and_rest)
    assert states(StrategyConfig(kind="deepspeed", zero_stage=1), 4) == (4000, 4000, 3000, BUCKET)
    assert states(StrategyConfig(kind="deepspeed", zero_stage=2), 4) == (4000, 1000, 3000, BUCKET)
    assert states(StrategyConfig(kind="deepspeed", zero_stage=3), 4) == (1000, 1000, 3000, BUCKET + LIVE)


def test_one_device_of_ddp_has_no_buckets_and_adapters_have_few_gradients() -> None:
    assert states(StrategyConfig(kind="ddp"), 1) == (4000, 4000, 8000, 0)
    assert states(StrategyConfig(kind="ddp"), 1, num_trained=10) == (4000, 40, 80, 0)


def test_offloaded_states_leave_the_device() -> None:
    assert states(StrategyConfig(kind="fsdp2", cpu_offload=True), 4)[:3] == (0, 0, 0)
    assert states(StrategyConfig(kind="deepspeed", zero_stage=3, cpu_offload=True), 4) == (1000, 1000, 0, BUCKET + LIVE)


def test_the_peak_of_a_policy_is_the_hand_count() -> None:
    """SMALL has 2 x 920 + 10 + 100 = 1,950 parameters.

    The batch has 9 tokens, 3 of them predicted, in bfloat16 with checkpointing on one device.
    """
    number = SMALL.policy_parameters
    assert number == 1950
    compute = ComputeConfig(precision="bfloat16", gradient_checkpointing=True)
    memory = trainer_memory(
        Trained(SMALL, number, number, has_reference=True),
        MicroBatch(9, 3),
        strategy=StrategyConfig(kind="ddp"),
        compute=compute,
        num_devices=1,
        overhead_bytes=5,
    )
    inputs, layer = 4 * 10 * 9 * 2, 9 * (36 * 10 + 8 * 20 + 8 * 2) + 9 * 4 * (4 * 10 + 2 * 20)
    logits, casts = 16 * 3 * 10, 2 * (number - 100)
    assert layer > casts
    assert inputs + layer + logits > 4 * number  # the update's temporary values
    assert memory.training_bytes == 16 * number + 4 * number + inputs + layer + logits + 5
    assert memory.loading_bytes == 8 * number
    assert memory.peak_bytes == memory.training_bytes


def test_loading_is_the_peak_of_a_deep_model_on_many_devices() -> None:
    """The model has 50 layers of 920 parameters and 110 more: two layers in use are far less than the whole model."""
    deep = replace(SMALL, num_layers=50)
    number = 50 * 920 + 110
    memory = trainer_memory(
        Trained(deep, number, number),
        NOTHING,
        strategy=StrategyConfig(kind="fsdp2"),
        compute=ComputeConfig(),
        num_devices=10**6,
        overhead_bytes=7,
    )
    assert memory.training_bytes < memory.peak_bytes == 4 * number + 7


def test_an_update_needs_a_value_of_each_weight_of_the_shard() -> None:
    """Without activations, the update is the peak of a step.

    On 4 devices, FSDP2 holds a quarter of 16 bytes per weight, and DDP holds all 16.
    """
    for strategy, shard, gathered in [
        (StrategyConfig(kind="ddp"), P, 4 * P),
        (StrategyConfig(kind="fsdp2", cpu_offload=False), P / 4, None),
    ]:
        memory = trainer_memory(
            Trained(SMALL, P, P), NOTHING, strategy=strategy, compute=ComputeConfig(), num_devices=4, overhead_bytes=0
        )
        assert memory.update_bytes == 4 * shard
        assert memory.training_bytes == 16 * shard + max(
            4 * shard, memory.gathered_bytes if gathered is None else gathered
        )


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(("hidden", "heads", "kv_heads", "wide"), [(64, 2, 2, 224), (128, 4, 2, 96), (256, 8, 2, 640)])
def test_a_layer_keeps_of_a_token_what_the_formula_says(
    precision: str, hidden: int, heads: int, kv_heads: int, wide: int
) -> None:
    """Count every storage that autograd saves once.

    Differences between lengths and between depths leave the bytes of one layer and one token.
    """
    compute = ComputeConfig.model_validate({"precision": precision})
    shape = shape_of_config(
        ModelConfig(hidden_size=hidden, intermediate_size=wide, num_heads=heads, num_kv_heads=kv_heads)
        if hidden // heads == 32
        else ModelConfig.model_construct(
            vocab_size=300,
            hidden_size=hidden,
            intermediate_size=wide,
            num_layers=1,
            num_heads=heads,
            num_kv_heads=kv_heads,
            max_position_embeddings=256,
        )
    )

    def kept(num_layers: int, num_groups: int) -> int:
        config = Qwen2Config(
            vocab_size=300,
            hidden_size=hidden,
            intermediate_size=wide,
            num_hidden_layers=num_layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            num_labels=1,
            pad_token_id=0,
        )
        return saved_bytes(
            PackedRewardModel(Qwen2ForSequenceClassification(config).eval(), Layout.SEGMENTS, compute), num_groups
        )

    tokens_more = 4 * 64
    counted = (kept(3, 8) - kept(3, 4) - kept(1, 8) + kept(1, 4)) / 2 / tokens_more
    assert counted == pytest.approx(saved_bytes_per_token_and_layer(shape, compute), rel=0.01)
    last = last_layer_saved_bytes(shape, compute, MicroBatch(tokens_more, num_scored=4 * 2))
    rotary_positions = 2 * 4 * shape.head_size * tokens_more  # cosines and sines, which all layers share
    assert kept(1, 8) - kept(1, 4) - rotary_positions == pytest.approx(last, rel=0.03)


def test_scored_tokens_alone_change_what_the_last_layer_keeps_and_nothing_else() -> None:
    """SMALL has 2 layers of 44 x 10 + 16 x 20 + 8 x 2 = 776 bytes per token.

    The last one keeps only 20 x 10 bytes per token, and 776 more for each of 3 scored tokens.
    """

    def kept(batch: MicroBatch) -> float:
        trained = Trained(SMALL, P, P)
        return trainer_memory(
            trained,
            batch,
            strategy=StrategyConfig(kind="ddp"),
            compute=ComputeConfig(),
            num_devices=1,
            overhead_bytes=0,
        ).kept_bytes

    assert kept(MicroBatch(9)) == 2 * 776 * 9
    assert kept(MicroBatch(9, num_scored=3)) == 776 * 9 + 200 * 9 + 776 * 3


def saved_bytes(model: PackedRewardModel, num_groups: int) -> int:
    """Return the bytes that a forward pass over groups of 64 tokens saves, without weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    batch = lay_out([TokenGroup([5] * 32, [[6] * 16, [7] * 16])] * num_groups, Layout.SEGMENTS, pad_id=0)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        scores = model(batch).scores_N
    assert scores.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


class CastCounter(TorchDispatchMode):
    """Count the casts of square matrices."""

    count = 0

    def __torch_dispatch__(
        self, function: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += function.overloadpacket is torch.ops.aten._to_copy and args[0].shape == (64, 64)
        return function(*args, **(kwargs or {}))


def test_autocast_keeps_the_casts_of_weights_that_fsdp2_has_given_back() -> None:
    """Each layer's weight is cast once in a whole context, so its copy outlives the gathered weight."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        layers = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(5)))
        for layer in layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(layers, mesh=mesh)
        with CastCounter() as casts, torch.autocast("cpu", dtype=torch.bfloat16):
            layers(torch.randn(3, 64))
            assert casts.count == 5
            layers(torch.randn(3, 64))
        assert casts.count == 5
    finally:
        dist.destroy_process_group()
