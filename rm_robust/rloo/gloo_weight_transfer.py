"""vLLM's end of the gloo weight transfer (vLLM 0.32). Imported by vLLM itself, through the factory that `register_gloo_backend` fills.

vLLM loads new weights layer by layer: while an update runs, parameters are placeholders, and a layer gets its real tensors, and on CPU its
prepacked oneDNN copy, when all of its parameters have arrived. Three gaps of that are closed here:
- a tied output head receives nothing of its own and would keep its old packed copy: `repack_tied_heads`;
- an aborted update leaves layers with part of their parameters, which would count towards the next update: `_forget_aborted_update`;
- a parameter that was never sent keeps its old value with only a warning: here it is an error.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from rm_robust.errors import RolloutError
from rm_robust.rloo.weight_broadcast import ParameterSpec, join_store, open_group, receive_weights

if TYPE_CHECKING:
    from torch.distributed import ProcessGroupGloo
    from vllm.config import VllmConfig
    from vllm.config.weight_transfer import WeightTransferConfig


@dataclass
class GlooInitInfo(WeightTransferInitInfo):
    """How to join the trainer's group: this engine's workers are the ranks from `rank_offset` on."""

    master_address: str
    master_port: int
    rank_offset: int
    world_size: int
    timeout_s: float


@dataclass
class GlooUpdateInfo(WeightTransferUpdateInfo):
    """The parameters that follow, in the order in which they are sent."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]


class GlooWeightTransferEngine(WeightTransferEngine[GlooInitInfo, GlooUpdateInfo]):
    """Receives the trainer's broadcasts and loads them into this worker's model."""

    init_info_cls = GlooInitInfo
    update_info_cls = GlooUpdateInfo

    def __init__(self, config: "WeightTransferConfig", vllm_config: "VllmConfig", device: torch.device, model: torch.nn.Module) -> None:
        super().__init__(config, vllm_config, device, model)
        self._group: ProcessGroupGloo | None = None
        # Taken before the first update: during one, a tied head is a placeholder of its own and would be missed.
        self._parameter_names = frozenset(name for name, _ in model.named_parameters())

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        parallel = self.parallel_config
        rank = init_info.rank_offset + parallel.data_parallel_index * parallel.world_size + parallel.rank
        store = join_store(init_info.master_address, init_info.master_port, init_info.world_size, init_info.timeout_s)
        self._group = open_group(store, rank, init_info.world_size, init_info.timeout_s)

    def start_weight_update(self) -> None:
        self._require_group()
        _forget_aborted_update(self.model)
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: GlooUpdateInfo) -> None:
        """Raises RolloutError when bytes were altered on the way or a parameter of the model did not come."""
        group = self._require_group()
        specs = [
            ParameterSpec(name, getattr(torch, dtype_name), tuple(shape))
            for name, dtype_name, shape in zip(update_info.names, update_info.dtype_names, update_info.shapes, strict=True)
        ]
        model: Any = self.model
        loaded_names: set[str] = set()

        def load(weights: list[tuple[str, Tensor]]) -> None:
            loaded_names.update(model.load_weights(weights))

        receive_weights(group, specs, load)
        missing = sorted(self._parameter_names - loaded_names)
        if missing:
            raise RolloutError(f"The trainer sent no weights for {len(missing)} parameters of the engine's model, the first is {missing[0]}.")

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        repack_tied_heads(self.model)

    def shutdown(self) -> None:
        """Leave the trainer's group; peers that wait for this worker get an error at once."""
        self._group = None

    def _require_group(self) -> "ProcessGroupGloo":
        if self._group is None:
            raise RolloutError("This engine is not connected to a trainer. Call init_weight_transfer_engine first.")
        return self._group


def repack_tied_heads(model: Any) -> None:
    """Pack every CPU output head again from its parameter, which a tied head shares with the embedding that was just updated."""
    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            head: Any = module  # mypy takes the attributes of a module for tensors
            if getattr(head, "cpu_linear", None) is not None and head.weight.numel():
                head.quant_method.process_weights_after_loading(head)


def _forget_aborted_update(model: Any) -> None:
    """Drop parameters that waited for the rest of their layer when an update was aborted."""
    for module in model.modules():
        info = get_layerwise_info(module)
        if info.can_load():
            info.loaded_weights.clear()
            info.load_numel = 0
