"""Replicated weights through torch DistributedDataParallel."""

import contextlib
import io
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rm_robust.config.shared import OptimizerConfig
from rm_robust.training.engines.engine import clip_and_update, new_optimizer


class DdpEngine:
    """Replicated weights, whose gradients are reduced over ranks once a step. A single rank runs the bare module."""

    def __init__(self, module: nn.Module, *, optimizer: OptimizerConfig, device: torch.device) -> None:
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        self.module = module.to(device)
        self.max_gradient_norm = optimizer.max_gradient_norm
        self.optimizer = new_optimizer(self.module, optimizer)
        self.replicated = DistributedDataParallel(self.module) if self.world_size > 1 else None

    def forward(self, *inputs: Any) -> Any:
        return (self.replicated or self.module)(*inputs)

    def micro_batch(self, *, is_last: bool) -> contextlib.AbstractContextManager[None]:
        if self.replicated is None or is_last:
            return contextlib.nullcontext()
        return self.replicated.no_sync()

    def backward(self, global_sum_term: Tensor) -> None:
        # DistributedDataParallel averages over ranks, and TrainEngine promises the sum
        (global_sum_term * self.world_size).backward()

    def step(self, learning_rate: float) -> float:
        return float(
            clip_and_update(self.module, self.optimizer, learning_rate, max_gradient_norm=self.max_gradient_norm)
        )

    def save(self, folder: Path) -> None:
        if self.rank == 0:
            torch.save(
                {"module": self.module.state_dict(), "optimizer": self.optimizer.state_dict()}, folder / "engine.pt"
            )

    def load(self, folder: Path) -> None:
        state = torch.load(io.BytesIO((folder / "engine.pt").read_bytes()), map_location="cpu", weights_only=True)
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])

    def full_parameter(self, parameter: Tensor) -> Tensor:
        return parameter.detach()

    def full_state_dict(self) -> dict[str, Tensor]:
        if self.rank:
            return {}
        return {name: tensor.detach().cpu() for name, tensor in self.module.state_dict().items()}
