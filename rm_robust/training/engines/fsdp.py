"""FSDP2 (torch fully_shard) behind the TrainEngine protocol.

Parameters, gradients and optimiser state are sharded over all ranks, one decoder layer at a time.
"""

import contextlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from rm_robust.config.shared import OptimizerConfig
from rm_robust.training.engines.engine import clip_and_update, new_optimizer


class FsdpEngine:
    """A module with sharded weights, which are gathered one layer at a time.

    Gradients are reduced over ranks after each micro-batch.
    """

    def __init__(
        self, module: nn.Module, *, optimizer: OptimizerConfig, device: torch.device, cpu_offload: bool
    ) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.max_gradient_norm = optimizer.max_gradient_norm
        mesh = init_device_mesh(device.type, (self.world_size,))
        offload = CPUOffloadPolicy(pin_memory=device.type == "cuda") if cpu_offload else OffloadPolicy()
        self.module = module if cpu_offload else module.to(device)
        for layer in decoder_layers(module):
            fully_shard(layer, mesh=mesh, offload_policy=offload)
        fully_shard(module, mesh=mesh, offload_policy=offload)
        self.optimizer = new_optimizer(module, optimizer)  # after sharding: it must hold the shards

    def forward(self, *inputs: Any) -> Any:
        return self.module(*inputs)

    def micro_batch(self, *, is_last: bool) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def backward(self, global_sum_term: Tensor) -> None:
        # FSDP averages over ranks, and TrainEngine promises the sum
        (global_sum_term * self.world_size).backward()

    def step(self, learning_rate: float) -> float:
        return float(
            full_value(
                clip_and_update(self.module, self.optimizer, learning_rate, max_gradient_norm=self.max_gradient_norm)
            )
        )

    def save(self, folder: Path) -> None:
        module_state, optimizer_state = get_state_dict(self.module, self.optimizer)
        state_dict_saver.save({"module": module_state, "optimizer": optimizer_state}, checkpoint_id=str(folder))

    def load(self, folder: Path) -> None:
        module_state, optimizer_state = get_state_dict(self.module, self.optimizer)
        state_dict_loader.load({"module": module_state, "optimizer": optimizer_state}, checkpoint_id=str(folder))
        set_state_dict(self.module, self.optimizer, model_state_dict=module_state, optim_state_dict=optimizer_state)

    def full_parameter(self, parameter: Tensor) -> Tensor:
        return full_value(parameter.detach())

    def full_state_dict(self) -> dict[str, Tensor]:
        state: dict[str, Any] = get_model_state_dict(
            self.module, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
        )
        return state


def decoder_layers(module: nn.Module) -> list[nn.Module]:
    """Return the decoder layers: the modules that transformers keeps whole (`_no_split_modules`)."""
    whole_names = {
        name for part in module.modules() if isinstance(part, PreTrainedModel) for name in part._no_split_modules or ()
    }
    layers = [part for part in module.modules() if type(part).__name__ in whole_names]
    assert layers, f"no decoder layer found in {type(module).__name__}: {sorted(whole_names)}"
    return layers


def full_value(tensor: Tensor) -> Tensor:
    """Return a sharded tensor's full value, on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
