"""How a transformers decoder computes in SFT, reward-model training and RLOO: autocast and gradient checkpointing."""

import contextlib

import torch
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from rm_robust.config.shared import ComputeConfig

EXACT = ComputeConfig()
"""float32 with every activation kept: for scoring, and for training unless the config says otherwise."""


def prepare_for_training(model: PreTrainedModel, config: ComputeConfig) -> None:
    """Turn on what the config asks for.

    The model stays in evaluation mode: a model's own dropout is off in training too, and adapters have none.
    """
    if config.compile:
        for layer in model.base_model.get_submodule("layers").children():
            layer.get_submodule("mlp").compile(dynamic=True)  # token counts differ from batch to batch
    if not config.gradient_checkpointing:
        return
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            # transformers checkpoints only layers in training mode; the children of the layer keep their mode
            layer.training = True


def autocast(device: torch.device, config: ComputeConfig) -> contextlib.AbstractContextManager[None]:
    """Return the context of a decoder's forward pass: bfloat16 products on float32 weights, or no change."""
    if config.precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def flops_per_token(model: PreTrainedModel) -> float:
    """Return the floating-point operations of one token's forward and backward pass.

    A weight counts 6 (Kaplan et al. 2020, section 2.1), or 4 where it is frozen and has no gradient of its own. The
    embedding table is looked up and does not count; attention does not count either. The result is too high for a
    reward model on CPUs, whose last layer is not computed for every token (models/last_layer.py).
    """
    embedding = model.get_input_embeddings().weight
    return float(
        sum(
            (6 if weight.requires_grad else 4) * weight.numel()
            for weight in model.parameters()
            if weight is not embedding
        )
    )
