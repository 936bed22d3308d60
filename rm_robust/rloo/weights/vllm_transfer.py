"""vLLM's end of the gloo weight transfer (vLLM 0.32): receive the trainer's weights and load them into the model.

vLLM itself imports this file, through the factory that `register_gloo_backend` fills. It serves CPU engines only; GPU
engines use vLLM's own NCCL transfer. It subclasses vllm.distributed.weight_transfer.base.WeightTransferEngine and reads
its `parallel_config`, `model_config` and `model`; vllm_loader.py lists the private names of vLLM that loading relies
on.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo

from rm_robust.errors import RolloutError
from rm_robust.rloo.weights.broadcast import ParameterSpec, join_store, open_group, receive_weights
from rm_robust.rloo.weights.shared_memory import MemoryAddress, load_shared_weights, num_shared_bytes, open_memory
from rm_robust.rloo.weights.vllm_loader import WeightLoader, new_loader

if TYPE_CHECKING:
    from torch.distributed import ProcessGroupGloo
    from vllm.config import VllmConfig
    from vllm.config.weight_transfer import WeightTransferConfig


@dataclass
class GlooInitInfo(WeightTransferInitInfo):
    """The address of the trainer's group. This engine's workers have the ranks from `rank_offset` on."""

    master_address: str
    master_port: int
    rank_offset: int
    world_size: int
    timeout_s: float


@dataclass
class GlooUpdateInfo(WeightTransferUpdateInfo):
    """The parameters of an update, in the order in which they are sent."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]
    shared_memory: tuple[str, int, int] | None
    """The `MemoryAddress` where the trainer shares them; None when they are broadcast."""


class GlooWeightTransferEngine(WeightTransferEngine[GlooInitInfo, GlooUpdateInfo]):
    """Loads the weights that the trainer broadcasts or shares into this worker's model."""

    init_info_cls = GlooInitInfo
    update_info_cls = GlooUpdateInfo

    def __init__(
        self, config: "WeightTransferConfig", vllm_config: "VllmConfig", device: torch.device, model: torch.nn.Module
    ) -> None:
        super().__init__(config, vllm_config, device, model)
        self._group: ProcessGroupGloo | None = None
        self._loaders: dict[tuple[ParameterSpec, ...], WeightLoader] = {}
        self._loader: WeightLoader | None = None
        self._shared: dict[MemoryAddress, Tensor] = {}

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        parallel = self.parallel_config
        rank = init_info.rank_offset + parallel.data_parallel_index * parallel.world_size + parallel.rank
        self._shared = {}
        store = join_store(init_info.master_address, init_info.master_port, init_info.world_size, init_info.timeout_s)
        self._group = open_group(store, rank, init_info.world_size, init_info.timeout_s)

    def start_weight_update(self) -> None:
        self._require_group()
        self._loader = None

    def receive_weights(self, update_info: GlooUpdateInfo) -> None:
        """Receive and load all weights of an update.

        Raises RolloutError when bytes were altered on the way, or a parameter of the model is not among those sent.
        """
        group = self._require_group()
        specs = [
            ParameterSpec(name, getattr(torch, dtype_name), tuple(shape))
            for name, dtype_name, shape in zip(
                update_info.names, update_info.dtype_names, update_info.shapes, strict=True
            )
        ]
        if tuple(specs) not in self._loaders:
            self._loaders = {tuple(specs): new_loader(self.model, self.model_config, specs)}
        loader = self._loaders[tuple(specs)]
        loader.start()
        if update_info.shared_memory is None:
            receive_weights(group, specs, loader.load)
        else:
            load_shared_weights(
                group,
                specs,
                self._shared_memory(MemoryAddress(*update_info.shared_memory), num_shared_bytes(specs)),
                loader.load,
            )
        self._loader = loader

    def finish_weight_update(self) -> None:
        """Put the loaded weights to use; do nothing when the update was aborted before they were all loaded."""
        if self._loader is not None:
            self._loader.finish()

    def shutdown(self) -> None:
        """Leave the trainer's group; peers that wait for this worker get an error at once."""
        self._group = None
        self._shared = {}

    def _shared_memory(self, address: MemoryAddress, num_bytes: int) -> Tensor:
        if address not in self._shared:
            self._shared = {address: open_memory(address, num_bytes)}
        return self._shared[address]

    def _require_group(self) -> "ProcessGroupGloo":
        if self._group is None:
            raise RolloutError("This engine is not connected to a trainer. Call init_weight_transfer_engine first.")
        return self._group
