"""Put received weights into a vLLM model (0.32).

On CPU, linear layers keep only a packed oneDNN copy of their weights. There are two loaders:

  DirectLoader     Finds out once where each of the trainer's parameters belongs in the model. In every update, each
                   parameter then goes straight to its place, and a layer is packed as soon as it is complete, while
                   other layers are still arriving. For unquantised models that take the trainer's tensors as they are.
  LayerwiseLoader  vLLM's own way, for all other models. In every update it replaces all parameters by placeholders and
                   counts what the model's loader would copy. It is slower: 0.5 ms per parameter, one more copy of
                   embeddings and norms, and a packed copy of the embedding that nothing reads.

With both, an aborted update leaves the model unusable, and the next update starts from the beginning. Neither waits for
the trainer.

This file makes weight updates of CPU engines faster and serves CPU engines only. It relies on private names of vLLM
0.32, and must be checked again with every new version:

  - the attributes `cpu_linear` and `quant_method` of layers, and `weight_loader` of parameters
  - `CPUDNNLGEMMHandler` in vllm._custom_ops; a layer's `cpu_linear` is a closure over one if oneDNN packed the layer
  - `get_layerwise_info`, with its `restore_metadata`, `can_load`, `loaded_weights` and `load_numel`, and
    `initialize_layerwise_reload`, `finalize_layerwise_reload`, `materialize_meta_tensor` and `restore_layer_refs`,
    all in vllm.model_executor.model_loader.reload
  - the shards that fused layers (QKVParallelLinear, MergedColumnParallelLinear) load by: "q", "k", "v", or a number
"""

import logging
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from vllm._custom_ops import CPUDNNLGEMMHandler
from vllm.config import ModelConfig
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.model_executor.model_loader.reload.meta import materialize_meta_tensor
from vllm.model_executor.model_loader.reload.sanitize import restore_layer_refs
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from rm_robust.errors import RolloutError
from rm_robust.rloo.weights.broadcast import ParameterSpec

logger = logging.getLogger(__name__)

NUM_PACKING_THREADS = 2
"""Number of layers that are packed at once: on the engine's core, and on that of a trainer beside it, which is waiting.

oneDNN packs a layer with one thread, however many OpenMP has.
"""
_SHARDS_OF_ATTENTION = ("q", "k", "v")
"""The names by which vLLM loads the parts of a fused attention layer, in the order in which they lie in it."""


class WeightLoader(Protocol):
    """Loads one update after the other: `start`, then `load` in any number of calls, then `finish`."""

    def start(self) -> None: ...

    def load(self, weights: list[tuple[str, Tensor]]) -> None: ...

    def finish(self) -> None:
        """Put all loaded weights to use. Raises RolloutError when a parameter of the model is missing."""
        ...


@dataclass(frozen=True)
class _Place:
    """The place in the model where a parameter of the trainer goes.

    It fills a layer's parameter, or in a fused layer a part of it; `arguments` and `keywords` tell vLLM's loader which.
    """

    layer: nn.Module
    parameter_name: str
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]


class DirectLoader:
    """Loads each parameter straight into its place (see the top of the file).

    Parameters that the layers still have are filled in place. A layer whose parameters packing has removed is packed
    from the memory in which the weights were received, as soon as it is complete.
    """

    def __init__(self, model: Any, places: dict[str, _Place]) -> None:
        self._places = places
        self._num_expected = Counter(place.layer for place in places.values())
        self._num_waiting = Counter[nn.Module]()
        self._pieces: dict[nn.Module, dict[str, list[tuple[_Place, Tensor]]]] = {}
        self._threads = ThreadPoolExecutor(NUM_PACKING_THREADS, thread_name_prefix="pack_weights")
        self._packing: list[Future[None]] = []
        embeddings: list[Any] = [layer for layer in model.modules() if isinstance(layer, VocabParallelEmbedding)]
        heads = _output_heads(model)
        self._tied_heads = {
            e: [head for head in heads if head is not e and head.weight is e.weight]
            for e in embeddings
            if e in self._num_expected
        }
        for embedding in embeddings:
            if embedding not in heads:
                embedding.cpu_linear = torch.nn.functional.linear  # vLLM has packed it like an output head

    def start(self) -> None:
        wait(self._packing)  # an aborted update may have left some
        self._packing = []
        self._num_waiting = self._num_expected.copy()
        self._pieces = {}

    def load(self, weights: list[tuple[str, Tensor]]) -> None:
        for name, tensor in weights:
            if name not in self._places:
                continue  # vLLM's own loader ignores such a name too
            place = self._places[name]
            live = getattr(place.layer, place.parameter_name)
            if _template_of(place.layer, place.parameter_name).shape == live.shape:
                _load_piece(live, place, tensor)
            else:
                self._pieces.setdefault(place.layer, {}).setdefault(place.parameter_name, []).append((place, tensor))
            self._num_waiting[place.layer] -= 1
            if not self._num_waiting[place.layer]:
                self._packing.append(
                    self._threads.submit(self._put_to_use, place.layer, self._pieces.pop(place.layer, {}))
                )

    def finish(self) -> None:
        for packing in self._packing:
            packing.result()
        num_incomplete = sum(num_waiting > 0 for num_waiting in self._num_waiting.values())
        if num_incomplete:
            raise RolloutError(
                f"{num_incomplete} layers of the engine's model did not get all of their weights. Publish them again."
            )

    @torch.no_grad()  # the caller's no_grad does not hold in this thread
    def _put_to_use(self, layer: Any, pieces_of: dict[str, list[tuple[_Place, Tensor]]]) -> None:
        for name, pieces in pieces_of.items():
            template = _template_of(layer, name)
            parameter = _side_by_side(pieces, template) if _packs_a_copy(layer) else None
            if parameter is None:
                parameter = restore_layer_refs(materialize_meta_tensor(template), layer)
                for place, tensor in pieces:
                    _load_piece(parameter, place, tensor)
            setattr(layer, name, parameter)  # packing removes it again
        for layer_to_pack in (layer, *self._tied_heads.get(layer, ())):
            repack(layer_to_pack)


class LayerwiseLoader:
    """Loads in vLLM's own way, with two faults repaired.

    Without the repairs a tied output head would keep its old packed copy, and the weights of an aborted update would
    count towards the next one.
    """

    def __init__(self, model: Any, model_config: ModelConfig) -> None:
        self._model = model
        self._model_config = model_config
        # Read before the first update: during an update a tied head is a separate placeholder, which would be missing.
        self._parameter_names = frozenset(name for name, _ in model.named_parameters())
        self._loaded_names: set[str] = set()

    def start(self) -> None:
        self._loaded_names = set()
        for module in self._model.modules():
            info = get_layerwise_info(module)
            if info.can_load():
                info.loaded_weights.clear()
                info.load_numel = 0
        initialize_layerwise_reload(self._model)

    def load(self, weights: list[tuple[str, Tensor]]) -> None:
        self._loaded_names.update(self._model.load_weights(weights))

    def finish(self) -> None:
        _require_none_missing(sorted(self._parameter_names - self._loaded_names))
        finalize_layerwise_reload(self._model, self._model_config)
        for head in _output_heads(self._model):
            repack(head)


def new_loader(model: Any, model_config: ModelConfig, specs: list[ParameterSpec]) -> WeightLoader:
    """Return the loader for updates that send `specs`.

    Raises ValueError for a parameter that the model does not know, and RolloutError when a parameter of the model would
    get no weights.
    """
    places = _find_places(model, specs)
    if places is None:
        logger.info("%s does not take weights as they are sent; vLLM's slower loader is used.", type(model).__name__)
        return LayerwiseLoader(model, model_config)
    num_sent = Counter[tuple[nn.Module, str]]()
    for spec in specs:
        if spec.name in places:
            num_sent[places[spec.name].layer, places[spec.name].parameter_name] += spec.num_elements
    missing = []
    for name, layer, parameter_name in _parameters(model):
        is_padded = isinstance(layer, VocabParallelEmbedding)
        num_needed = 1 if is_padded else _template_of(layer, parameter_name).numel()
        if num_sent[layer, parameter_name] < num_needed:
            missing.append(name)
    _require_none_missing(missing)
    return DirectLoader(model, places)


def repack(layer: Any) -> None:
    """Pack a CPU layer again from its parameter; do nothing for layers that are not packed."""
    if getattr(layer, "cpu_linear", torch.nn.functional.linear) is not torch.nn.functional.linear:
        layer.quant_method.process_weights_after_loading(layer)


def _find_places(model: Any, specs: list[ParameterSpec]) -> dict[str, _Place] | None:
    """Find out where the model's own loader puts each parameter, by letting it load placeholders.

    Returns None when the loader changes a parameter on the way, or a layer is quantised.
    """
    placeholders = {spec.name: torch.empty(spec.shape, dtype=spec.dtype, device="meta") for spec in specs}
    name_of = {id(placeholder): name for name, placeholder in placeholders.items()}
    places: dict[str, _Place] = {}
    is_direct = True

    def recorder(layer: nn.Module, parameter_name: str) -> Callable[..., None]:
        def record(_: Tensor, loaded_weight: Tensor, *arguments: Any, **keywords: Any) -> None:
            nonlocal is_direct
            quant_method = getattr(layer, "quant_method", None)
            is_plain = quant_method is None or isinstance(
                quant_method, UnquantizedLinearMethod | UnquantizedEmbeddingMethod
            )
            is_direct = is_direct and is_plain and name_of.get(id(loaded_weight)) not in (None, *places)
            if is_direct:
                places[name_of[id(loaded_weight)]] = _Place(layer, parameter_name, arguments, keywords)

        return record

    parameters: list[tuple[Any, dict[str, Any]]] = []
    try:
        for _, layer, parameter_name in _parameters(model):
            parameter: Any = getattr(layer, parameter_name)
            parameters.append((parameter, dict(parameter.__dict__)))
            parameter.weight_loader = recorder(layer, parameter_name)
        model.load_weights(placeholders.items())
    finally:
        for parameter, attributes in parameters:
            parameter.__dict__.clear()
            parameter.__dict__.update(attributes)
    return places if is_direct else None


def _parameters(model: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """Return (name, layer, name in the layer) of every parameter; a tied one comes once."""
    layers = dict(model.named_modules())
    return [(name, layers[name.rpartition(".")[0]], name.rpartition(".")[2]) for name, _ in model.named_parameters()]


def _template_of(layer: nn.Module, parameter_name: str) -> Tensor:
    """Return a parameter's shape, dtype and loader as the model was built; packing removes some parameters."""
    template = get_layerwise_info(layer).restore_metadata[0].get(parameter_name)
    # biases have no template, and packing never removes them
    return getattr(layer, parameter_name) if template is None else template


def _load_piece(parameter: Tensor, place: _Place, tensor: Tensor) -> None:
    getattr(parameter, "weight_loader", default_weight_loader)(parameter, tensor, *place.arguments, **place.keywords)


def _packs_a_copy(layer: Any) -> bool:
    """Return whether packing makes a copy, as oneDNN's does.

    vLLM's other ways of packing may continue to read the original, which here is memory that the trainer changes.
    """
    closure = getattr(getattr(layer, "cpu_linear", None), "__closure__", None) or ()
    return any(isinstance(cell.cell_contents, CPUDNNLGEMMHandler) for cell in closure)


def _side_by_side(pieces: list[tuple[_Place, Tensor]], template: Tensor) -> Tensor | None:
    """Return one parameter as a view of the memory of its pieces; None unless they lie there in order of their rows."""
    ordered = sorted(pieces, key=lambda piece: _position(piece[0]))
    storage, next_pointer = ordered[0][1].untyped_storage().data_ptr(), ordered[0][1].data_ptr()
    for position, (place, tensor) in enumerate(ordered):
        is_next = (
            tensor.untyped_storage().data_ptr() == storage
            and tensor.data_ptr() == next_pointer
            and tensor.is_contiguous()
        )
        if (
            not is_next
            or _position(place) != position
            or tensor.dtype != template.dtype
            or tensor.shape[1:] != template.shape[1:]
        ):
            return None
        next_pointer += tensor.nbytes
    if sum(tensor.numel() for _, tensor in ordered) != template.numel():
        return None
    view = ordered[0][1].as_strided(template.shape, torch.empty(template.shape, device="meta").stride())
    return nn.Parameter(view, requires_grad=False)


def _position(place: _Place) -> int:
    """Return the position of a piece in its parameter, or -1 if it is unknown.

    It follows from the shard that vLLM's fused layers (QKVParallelLinear, MergedColumnParallelLinear) name.
    """
    if place.keywords or len(place.arguments) > 1:
        return -1
    shard = place.arguments[0] if place.arguments else 0
    if shard in _SHARDS_OF_ATTENTION:
        return _SHARDS_OF_ATTENTION.index(shard)
    return shard if isinstance(shard, int) else -1


def _output_heads(model: Any) -> list[Any]:
    """Return the layers that compute logits: ParallelLMHead, and embeddings that are also used as the head."""
    num_uses = Counter(module for _, module in model.named_modules(remove_duplicate=False))
    return [
        m
        for m in model.modules()
        if isinstance(m, ParallelLMHead) or (isinstance(m, VocabParallelEmbedding) and num_uses[m] > 1)
    ]


def _require_none_missing(names: list[str]) -> None:
    if names:
        raise RolloutError(
            f"The trainer sent no weights for all or part of {len(names)} parameters of the engine's model; "
            f"the first is {names[0]}."
        )
