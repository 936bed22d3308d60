"""Put received weights into a vLLM model (0.32), whose linear layers on CPU keep nothing but a packed oneDNN copy of theirs.

  DirectLoader     what each parameter of the trainer is for the model is found out once; then every one goes straight to its place, and a layer is
                   packed when it is whole, while others still come. For models that take the trainer's tensors as they are, unquantised.
  LayerwiseLoader  vLLM's own: anew for every update it replaces all parameters by placeholders and counts what the model's loader would copy. For the
                   rest. Slower: 0.5 ms a parameter, a copy more of embeddings and norms, and a packed copy of the embedding that nothing reads.

Both leave the model unusable when an update is aborted, and start afresh at the next. Neither waits for the trainer.
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
"""The engine's own core, and that of the trainer beside it, which waits meanwhile. oneDNN packs a layer with one thread, whatever OpenMP has."""
_SHARDS_OF_ATTENTION = ("q", "k", "v")


class WeightLoader(Protocol):
    """One update: `start`, `load` of everything in any number of calls, `finish`."""

    def start(self) -> None: ...

    def load(self, weights: list[tuple[str, Tensor]]) -> None: ...

    def finish(self) -> None:
        """Everything is in use when it returns. Raises RolloutError when a parameter of the model did not come."""
        ...


@dataclass(frozen=True)
class _Place:
    """Where a parameter of the trainer goes: all or, in a fused layer, part of a layer's parameter; `arguments` tell vLLM's loader which part."""

    layer: nn.Module
    parameter_name: str
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]


class DirectLoader:
    """See the top of the file. Layers keep their live parameters; those that packing removed are packed from where they were received, when all has come."""

    def __init__(self, model: Any, places: dict[str, _Place]) -> None:
        self._places = places
        self._num_sources = Counter(place.layer for place in places.values())
        self._num_waiting = Counter[nn.Module]()
        self._pieces: dict[nn.Module, dict[str, list[tuple[_Place, Tensor]]]] = {}
        self._threads = ThreadPoolExecutor(NUM_PACKING_THREADS, thread_name_prefix="pack_weights")
        self._packing: list[Future[None]] = []
        embeddings: list[Any] = [layer for layer in model.modules() if isinstance(layer, VocabParallelEmbedding)]
        heads = _output_heads(model)
        self._tied_heads = {
            e: [head for head in heads if head is not e and head.weight is e.weight]
            for e in embeddings
            if e in self._num_sources
        }
        for embedding in embeddings:
            if embedding not in heads:
                embedding.cpu_linear = torch.nn.functional.linear  # vLLM packed it as if it were an output head

    def start(self) -> None:
        wait(self._packing)  # of an update that was aborted
        self._packing = []
        self._num_waiting = self._num_sources.copy()
        self._pieces = {}

    def load(self, weights: list[tuple[str, Tensor]]) -> None:
        for name, tensor in weights:
            if name not in self._places:
                continue  # vLLM's own loader ignores it too
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
        late = sum(num_waiting > 0 for num_waiting in self._num_waiting.values())
        if late:
            raise RolloutError(
                f"{late} layers of the engine's model did not get all of their weights. Publish them again."
            )

    @torch.no_grad()  # a thread begins without
    def _put_to_use(self, layer: Any, pieces_of: dict[str, list[tuple[_Place, Tensor]]]) -> None:
        for name, pieces in pieces_of.items():
            template = _template_of(layer, name)
            whole = _side_by_side(pieces, template) if _packs_a_copy(layer) else None
            if whole is None:
                whole = restore_layer_refs(materialize_meta_tensor(template), layer)
                for place, tensor in pieces:
                    _load_piece(whole, place, tensor)
            setattr(layer, name, whole)  # until it is packed
        for packed in (layer, *self._tied_heads.get(layer, ())):
            repack(packed)


class LayerwiseLoader:
    """vLLM's own way, with two gaps closed: a tied output head would keep its old packed copy, and an aborted update would count towards the next."""

    def __init__(self, model: Any, model_config: ModelConfig) -> None:
        self._model = model
        self._model_config = model_config
        # Taken before the first update: during one, a tied head is a placeholder of its own and would be missed.
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
    """The loader for updates that send `specs`. Raises ValueError for a parameter that the model does not know, RolloutError when one would be missing."""
    places = _find_places(model, specs)
    if places is None:
        logger.info("%s does not take weights as they are sent: vLLM's slower loader is used.", type(model).__name__)
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
    """Pack a CPU layer again from its parameter; does nothing for layers that are not packed."""
    if getattr(layer, "cpu_linear", torch.nn.functional.linear) is not torch.nn.functional.linear:
        layer.quant_method.process_weights_after_loading(layer)


def _find_places(model: Any, specs: list[ParameterSpec]) -> dict[str, _Place] | None:
    """What the model's own loader does with each parameter, by letting it load placeholders; None when it changes them or a layer is quantised."""
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
    """(name, layer, name in the layer) of every parameter, a tied one once."""
    layers = dict(model.named_modules())
    return [(name, layers[name.rpartition(".")[0]], name.rpartition(".")[2]) for name, _ in model.named_parameters()]


def _template_of(layer: nn.Module, parameter_name: str) -> Tensor:
    """Shape, dtype and loader of a parameter as the model was built: packing has removed some live ones."""
    template = get_layerwise_info(layer).restore_metadata[0].get(parameter_name)
    return (
        getattr(layer, parameter_name) if template is None else template
    )  # biases are never removed and have no template


def _load_piece(parameter: Tensor, place: _Place, tensor: Tensor) -> None:
    getattr(parameter, "weight_loader", default_weight_loader)(parameter, tensor, *place.arguments, **place.keywords)


def _packs_a_copy(layer: Any) -> bool:
    """As oneDNN does. vLLM's other ways of packing may go on reading what they were given, which here is memory that the trainer changes."""
    closure = getattr(getattr(layer, "cpu_linear", None), "__closure__", None) or ()
    return any(isinstance(cell.cell_contents, CPUDNNLGEMMHandler) for cell in closure)


def _side_by_side(pieces: list[tuple[_Place, Tensor]], template: Tensor) -> Tensor | None:
    """The pieces of one parameter as a view of the memory in which they lie as they would in it, row after row; None when they do not."""
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
    whole = ordered[0][1].as_strided(template.shape, torch.empty(template.shape, device="meta").stride())
    return nn.Parameter(whole, requires_grad=False)


def _position(place: _Place) -> int:
    """Of a piece in its parameter, by the shard that vLLM's fused layers (QKVParallelLinear, MergedColumnParallelLinear) name; -1 for any other."""
    if place.keywords or len(place.arguments) > 1:
        return -1
    shard = place.arguments[0] if place.arguments else 0
    if shard in _SHARDS_OF_ATTENTION:
        return _SHARDS_OF_ATTENTION.index(shard)
    return shard if isinstance(shard, int) else -1


def _output_heads(model: Any) -> list[Any]:
    """Layers that compute logits: ParallelLMHead, and embeddings that stand in the model a second time, as its head."""
    times = Counter(module for _, module in model.named_modules(remove_duplicate=False))
    return [
        m
        for m in model.modules()
        if isinstance(m, ParallelLMHead) or (isinstance(m, VocabParallelEmbedding) and times[m] > 1)
    ]


def _require_none_missing(names: list[str]) -> None:
    if names:
        raise RolloutError(
            f"The trainer sent no weights for all or part of {len(names)} parameters of the engine's model, the first is {names[0]}."
        )
