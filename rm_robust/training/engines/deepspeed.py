"""DeepSpeed ZeRO 1-3 behind the TrainEngine protocol. No other file imports deepspeed.

DeepSpeed ignores unknown config keys and clips at 1.0 by default, so every key is written here and checked by a test.
"""

import contextlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rm_robust.config.shared import OptimizerConfig
from rm_robust.training.engines.engine import new_optimizer


def deepspeed_config(*, zero_stage: int, max_gradient_norm: float, cpu_offload: bool) -> dict[str, Any]:
    """Return DeepSpeed's own config.

    The batch sizes are 1, so that DeepSpeed does not scale the losses, which are sums over the global batch already.
    """
    offload = {"offload_optimizer": {"device": "cpu", "pin_memory": False}} if cpu_offload else {}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": max_gradient_norm,
        "zero_optimization": {
            "stage": zero_stage,
            "overlap_comm": False,
            "stage3_param_persistence_threshold": 0,
            "stage3_gather_16bit_weights_on_model_save": True,
            **offload,
        },
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }


class DeepSpeedEngine:
    """A module whose optimiser state (from stage 1), gradients (from 2) and parameters (3) are sharded over ranks."""

    def __init__(
        self, module: nn.Module, *, zero_stage: int, cpu_offload: bool, optimizer: OptimizerConfig, device: torch.device
    ) -> None:
        if device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed

        self.zero_stage = zero_stage
        self.module = module.to(device)
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=self.module,
            optimizer=new_optimizer(self.module, optimizer),
            dist_init_required=False,
            config=deepspeed_config(
                zero_stage=zero_stage, max_gradient_norm=optimizer.max_gradient_norm, cpu_offload=cpu_offload
            ),
        )
        self.rank = torch.distributed.get_rank()
        self.world_size = torch.distributed.get_world_size()

    def micro_batch(self, *, is_last: bool) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def forward(self, *inputs: Any) -> Any:
        return self.engine(*inputs)

    def backward(self, global_sum_term: Tensor) -> None:
        # ZeRO averages over ranks, and TrainEngine promises the sum
        self.engine.backward(global_sum_term * self.world_size)

    def step(self, learning_rate: float) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.engine.step()
        # DeepSpeed leaves the weights as they are when a gradient is not finite, and gives the norm inf.
        norm = self.engine.get_global_grad_norm()
        return float(norm) if norm is not None else float("nan")

    def save(self, folder: Path) -> None:
        self.engine.save_checkpoint(str(folder), tag="engine")

    def load(self, folder: Path) -> None:
        loaded, _ = self.engine.load_checkpoint(str(folder), tag="engine")
        assert loaded is not None, f"DeepSpeed found no checkpoint in {folder}"

    def full_parameter(self, parameter: Tensor) -> Tensor:
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter], enabled=self.zero_stage == 3):
            return parameter.detach().clone()

    def full_state_dict(self) -> dict[str, Tensor]:
        state = self.engine._zero3_consolidated_16bit_state_dict() if self.zero_stage == 3 else self.module.state_dict()
        if self.rank:
            return {}
        return {name: tensor.detach().cpu() for name, tensor in state.items()}
