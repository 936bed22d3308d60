"""How a transformers decoder computes under training: autocast and gradient checkpointing (shared by SFT, reward model and RLOO)."""

import contextlib

import torch
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from rm_robust.config.shared import ComputeConfig

EXACT = ComputeConfig()
"""float32, every activation kept: scoring, and training unless the config says otherwise."""


def prepare_for_training(model: PreTrainedModel, config: ComputeConfig) -> None:
    """Turn on what the config asks for. The model stays in evaluation mode: a model's own dropout is off in training too, and adapters have none."""
    if config.compile:
        for layer in model.base_model.get_submodule("layers").children():
            layer.get_submodule("mlp").compile(dynamic=True)  # token counts differ from batch to batch
    if not config.gradient_checkpointing:
        return
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.training = (
                True  # transformers checkpoints only layers in training mode; the layer's own children keep theirs
            )


def autocast(device: torch.device, config: ComputeConfig) -> contextlib.AbstractContextManager[None]:
    """The context of a decoder's forward pass: bfloat16 products on float32 weights, or nothing."""
    if config.precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def flops_per_token(model: PreTrainedModel) -> float:
    """Floating-point operations of a token's forward and backward pass: 6 a weight (Kaplan et al. 2020, section 2.1), 4 where it is frozen and has no
    gradient of its own. The embedding table is looked up, and attention is not counted. Too many for a reward model on CPUs, whose last layer is not computed
    for every token (reward_model/last_layer.py)."""
    embedding = model.get_input_embeddings().weight
    return float(
        sum(
            (6 if weight.requires_grad else 4) * weight.numel()
            for weight in model.parameters()
            if weight is not embedding
        )
    )
