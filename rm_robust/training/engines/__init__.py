"""Train a module over ranks with one engine for each strategy; all keep to the protocol of engine.py."""

import torch
from torch import nn

from rm_robust.config.shared import OptimizerConfig, StrategyConfig
from rm_robust.training.engines.ddp import DdpEngine
from rm_robust.training.engines.engine import TrainEngine


def create_engine(
    module: nn.Module, *, strategy: StrategyConfig, optimizer: OptimizerConfig, device: torch.device
) -> TrainEngine:
    """Return the engine that `strategy.kind` names, with `module` on `device`.

    torch.distributed must be initialised when there is more than one rank.
    """
    if strategy.kind == "deepspeed":
        from rm_robust.training.engines.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(
            module, zero_stage=strategy.zero_stage, cpu_offload=strategy.cpu_offload, optimizer=optimizer, device=device
        )
    if strategy.kind == "fsdp2":
        from rm_robust.training.engines.fsdp import FsdpEngine

        return FsdpEngine(module, optimizer=optimizer, device=device, cpu_offload=strategy.cpu_offload)
    return DdpEngine(module, optimizer=optimizer, device=device)
