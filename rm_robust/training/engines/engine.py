"""One place that knows how a module is trained over ranks (shared by SFT, reward model and RLOO).

Losses are written for the whole optimiser-step batch: each rank passes its own terms of one global sum, and the gradient that reaches the
optimiser is that of the sum over ranks and micro-batches, whatever their number. Clipping, schedule and AdamW are the same for every strategy.
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
        """The module's forward, ready for `backward`."""

    def micro_batch(self, *, is_last: bool) -> contextlib.AbstractContextManager[None]:
        """Encloses forward and backward of one micro-batch. Ranks meet on the step's last one, or on each: all need the same number."""

    def backward(self, global_sum_term: Tensor) -> None:
        """Add the gradient of this rank's term of a sum over all ranks (a scalar)."""

    def step(self, learning_rate: float) -> float:
        """Clip, update and clear; returns the global gradient norm before clipping."""

    def save(self, folder: Path) -> None:
        """Weights and optimiser state of every rank into a shared folder."""

    def load(self, folder: Path) -> None:
        """Undo `save` exactly."""

    def full_parameter(self, parameter: Tensor) -> Tensor:
        """The whole of one of the module's parameters, on every rank, without gradient."""

    def full_state_dict(self) -> dict[str, Tensor]:
        """Whole weights on CPU on rank 0 (empty elsewhere), under the inner module's own names."""


def largest_over_ranks(count: int, device: torch.device) -> int:
    """The largest `count` of any rank. ZeRO's forward and backward are collective: every rank must run as many as the busiest one."""
    largest = torch.tensor(count, device=device)
    if dist.is_initialized():
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


def new_optimizer(module: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW (or SGD) over the trainable parameters; weight decay spares norms and biases, as is usual."""
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
    """One update at `learning_rate`, gradients clipped before and cleared after; returns their norm before clipping. RuntimeError when it is not finite."""
    norm = nn.utils.clip_grad_norm_(module.parameters(), max_gradient_norm, error_if_nonfinite=True)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def learning_rate_at(step: int, num_steps: int, config: OptimizerConfig) -> float:
    """Learning rate of step `step` (0-based) of `num_steps`: linear warm-up to the peak, then constant, linear or cosine to zero."""
    num_warmup = math.ceil(config.warmup_fraction * num_steps)
    if step < num_warmup:
        return config.learning_rate * (step + 1) / num_warmup
    progress = (step - num_warmup) / max(num_steps - num_warmup, 1)
    if config.schedule == "linear":
        return config.learning_rate * (1 - progress)
    if config.schedule == "cosine":
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
    return config.learning_rate
