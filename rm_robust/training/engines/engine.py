"""The protocol of the engines, which train a module over ranks, and what all engines share.

Losses are written for the whole optimiser-step batch: each rank passes its own terms of one global sum, and the
gradient that reaches the optimiser is that of the sum over ranks and micro-batches, whatever their number. Clipping,
schedule and AdamW are the same for every strategy. SFT, reward-model training and RLOO use the engines.
"""

import contextlib
import math
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rm_robust.config.shared import OptimizerConfig


class TrainEngine(Protocol):
    """A module under training. Every rank makes the same calls in the same order."""

    rank: int
    world_size: int

    def forward(self, *inputs: Any) -> Any:
        """Run the module's forward pass, ready for `backward`."""

    def micro_batch(self, *, is_last: bool) -> contextlib.AbstractContextManager[None]:
        """Return the context of forward and backward of one micro-batch.

        Ranks communicate on the step's last micro-batch, or on each one, so all ranks need the same number of them.
        """

    def backward(self, global_sum_term: Tensor) -> None:
        """Add the gradient of this rank's term of a sum over all ranks (a scalar)."""

    def step(self, learning_rate: float) -> float:
        """Clip, update and clear the gradients; return their global norm before clipping."""

    def save(self, folder: Path) -> None:
        """Write this rank's part of the weights and the optimiser state into `folder`, which all ranks share."""

    def load(self, folder: Path) -> None:
        """Load exactly what `save` wrote."""

    def full_parameter(self, parameter: Tensor) -> Tensor:
        """Return the whole of one of the module's parameters, on every rank, without gradient."""

    def full_state_dict(self) -> dict[str, Tensor]:
        """Return the whole weights on CPU on rank 0 (nothing elsewhere), under the inner module's own names."""


def largest_over_ranks(count: int, device: torch.device) -> int:
    """Return the largest `count` of any rank.

    ZeRO's forward and backward are collective, so every rank must run as many as the busiest one.
    """
    largest = torch.tensor(count, device=device)
    if dist.is_initialized():
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


def new_optimizer(module: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Return AdamW (or SGD) over the trainable parameters. As is usual, norms and biases have no weight decay."""
    decayed = [p for p in module.parameters() if p.requires_grad and p.ndim >= 2]
    spared = [p for p in module.parameters() if p.requires_grad and p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": spared, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if config.kind == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95))


def clip_and_update(
    module: nn.Module, optimizer: torch.optim.Optimizer, learning_rate: float, *, max_gradient_norm: float
) -> Tensor:
    """Clip the gradients, update at `learning_rate` and clear them; return their norm before clipping.

    Raises RuntimeError when the norm is not finite.
    """
    norm = nn.utils.clip_grad_norm_(module.parameters(), max_gradient_norm, error_if_nonfinite=True)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def learning_rate_at(step: int, num_steps: int, config: OptimizerConfig) -> float:
    """Return the learning rate of step `step` (0-based) of `num_steps`.

    It rises linearly to the peak, and then stays there or falls to zero, linearly or as a cosine.
    """
    num_warmup = math.ceil(config.warmup_fraction * num_steps)
    if step < num_warmup:
        return config.learning_rate * (step + 1) / num_warmup
    progress = (step - num_warmup) / max(num_steps - num_warmup, 1)
    if config.schedule == "linear":
        return config.learning_rate * (1 - progress)
    if config.schedule == "cosine":
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
    return config.learning_rate
